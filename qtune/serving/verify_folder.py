"""`qtune verify`: whether a folder is still the export that was measured, wherever it is now.

Three questions, each answered by itself: are the files the same, do tokenizer and chat template
still make the same tokens, and does the model, loaded by a library of choice, still answer the
golden prompts so? A folder whose weights are damaged is not loaded.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich import box
from rich.table import Table

from qtune.errors import UserError
from qtune.export.folder import golden, manifest
from qtune.export.folder.golden import Replay
from qtune.model.load import load_tokenizer
from qtune.progress import console, say
from qtune.serving import contents, prompting, replay
from qtune.serving.difference import Difference


@dataclass
class Report:
    """What a folder's check found: what differs, and each golden prompt answered again.

    `consumer` is the library that loaded it, `notes` what may explain a difference.
    """

    consumer: str
    differences: list[Difference] = field(default_factory=list)
    replays: list[Replay] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check(folder: Path, consumer: str | None = None, base: Path | None = None) -> None:
    """Verify an exported folder and show the result.

    Raises UserError with all that differs, for a folder that is no export, and for a consumer that
    is unknown or not installed.
    """
    report = verify(folder, consumer, base)
    _show(report)
    if report.differences:
        found = "\n".join(f"  {difference}" for difference in report.differences)
        raise UserError(f"{folder} is not what was exported and measured:\n{found}")
    files = len(manifest.read(folder)["files"])
    answers = f", and so are {len(report.replays)} answers" if report.replays else ""
    say(f"{folder}: {files} files, tokens and template are as they were written{answers}")


def verify(folder: Path, consumer: str | None = None, base: Path | None = None) -> Report:
    """What differs between an exported folder and what its qtune.json says of it.

    `consumer` is the library to load it with, `base` the folder of an adapter's base. Raises
    UserError as `check` does, except for differences.
    """
    written = manifest.read(folder)
    report = Report(consumer or written["consumer"], contents.differences(folder, written))
    if any(difference.breaks for difference in report.differences):
        report.notes.append("not loaded: files are missing or damaged")
        return report
    tokenizer = load_tokenizer(folder)
    report.differences += prompting.differences(tokenizer, written)
    report.notes += _versions(written)
    if not written["golden"]:
        report.notes.append("not loaded: it has no golden prompts, for it was never measured")
        return report
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        report.differences += replay.base_differences(written, base)
        model = replay.load(folder, written, consumer, base, device)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        # what was found is the likely reason, and told
        if not report.differences:
            raise
        report.notes.append(f"not loaded: {error}")
        return report
    report.replays = replay.replays(model, written)
    for number, found in enumerate(report.replays, start=1):
        report.differences += replay.told(number, found, tokenizer)
    return report


def _versions(written: dict[str, dict[str, str | None]]) -> list[str]:
    """Libraries that are not as they were, which alone makes no difference."""
    now = manifest.versions()
    return [
        f"{name} {now.get(name) or 'is not installed'}, and was {was}"
        for name, was in written["versions"].items()
        if was is not None and now.get(name) != was
    ]


def _show(report: Report) -> None:
    """Print what was loaded and how it answers."""
    for note in report.notes:
        say(f"note: {note}")
    if not report.replays:
        return
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else None, pad_edge=False)
    table.add_column(f"golden prompt, {report.consumer}")
    table.add_column("log-probabilities moved by (nats)", justify="right")
    table.add_column("answer")
    for number, found in enumerate(report.replays, start=1):
        same = "the same" if found.first is None else f"differs at token {found.first.index + 1}"
        table.add_row(str(number), f"{found.change:.4f}", same)
    console.print(table)
    say(f"Rounding may move log-probabilities by {golden.MAX_CHANGE} nats.")
