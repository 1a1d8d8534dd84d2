"""Golden prompts played again to an exported folder, loaded by a library of choice."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from qtune.errors import UserError
from qtune.export import verify
from qtune.export.exporter import ADAPTERS, exporter_names, load_exporter
from qtune.export.folder import golden, manifest
from qtune.export.folder.golden import Replay
from qtune.export.verify import Model
from qtune.model import sources
from qtune.progress import say
from qtune.serving.difference import Difference


def load(
    folder: Path,
    written: dict[str, Any],
    consumer: str | None,
    base: Path | None,
    device: torch.device,
) -> Model:
    """The model of the folder as `consumer` loads it, by default the library it was written for.

    Raises UserError for a library that is missing or loads no such folder, and where the base of an
    adapter is not found.
    """
    name = _exporter(written, consumer)
    base_folder = base or folder
    if base is None and written["form"] == "adapter":
        base_folder = _base(written)
    return load_exporter(name).load(folder, base_folder, device)


def base_differences(written: dict[str, Any], base: Path | None) -> list[Difference]:
    """Whether the base of an adapter is the one that it was trained on."""
    if written["form"] != "adapter":
        return []
    folder = base or _base(written)
    found, wanted = manifest.base_hash(folder), written["base"]
    if found == {"sha256": wanted["sha256"], "of": wanted["of"]}:
        return []
    was, now = (hashes["sha256"][:16] for hashes in (wanted, found))
    return [Difference("base", f"the SHA-256 of {folder} is {now}, and was {was}")]


def replays(model: Model, written: dict[str, Any]) -> list[Replay]:
    """How the model answers each golden prompt."""
    return [
        golden.compare(
            entry,
            verify.answer_log_probabilities(model, entry["prompt_ids"], entry["greedy_ids"]),
        )
        for entry in written["golden"]
    ]


def told(number: int, replay: Replay, tokenizer: PreTrainedTokenizerBase) -> list[Difference]:
    """What is to be said of golden prompt `number`, if anything."""
    found = []
    if replay.first is not None:
        now, was = (
            f"{token} ({str(tokenizer.decode([token]))!r})"
            for token in (replay.first.found, replay.first.expected)
        )
        found.append(f"token {replay.first.index + 1} of the answer is {now}, and was {was}")
    # not `change > limit`: NaN must be told
    if not replay.change <= golden.MAX_CHANGE:
        found.append(
            f"log-probabilities moved by {replay.change:.3f} nats (limit {golden.MAX_CHANGE})"
        )
    return [Difference(f"golden prompt {number}", what) for what in found]


def _exporter(written: dict[str, Any], consumer: str | None) -> str:
    """The exporter whose way to load is the consumer's; the folder's own where that is it."""
    own: str = written["export"]
    if consumer in (None, written["consumer"]):
        return own
    adapter = written["form"] == "adapter"
    names = [name for name in reversed(exporter_names()) if (name in ADAPTERS) == adapter]
    known = {load_exporter(name).consumer: name for name in names}
    if consumer not in known:
        raise UserError(
            f"--with {consumer}: nothing of that name loads such a folder; there are "
            f"{', '.join(sorted(known))}, and it was written for {written['consumer']}"
        )
    return known[consumer]


def _base(written: dict[str, Any]) -> Path:
    """The folder of the base that an adapter was trained on. UserError: it cannot be had."""
    base = written["base"]
    try:
        return sources.resolve(base["model"], revision=base["revision"], report=say)
    except UserError as error:
        raise UserError(f"the adapter's base: {error}; or name its folder with --base") from error
