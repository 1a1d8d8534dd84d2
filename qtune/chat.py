"""`qtune chat`: talk to a base model or to a finished run, word by word as the answer comes.

The conversation is rendered by the same code as the training rows, and decoded greedily as in the
evaluation, so what is seen here is what was trained and measured; a run whose chat template is no
longer the one it was trained with is refused. A run also starts with the system message of its
data: without the words it was trained under, a tuned model is another model. The whole conversation
is read anew at each turn: some templates change earlier turns, which a kept cache would not notice.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, TextStreamer

from qtune import run_folder
from qtune.data.chat import prompt_ids
from qtune.data.rows import Message
from qtune.data.sources import load as load_rows
from qtune.data.template import use_template
from qtune.errors import UserError
from qtune.evaluate.generate import generate_ids, stop_ids
from qtune.evaluate.mode import measuring
from qtune.export.folder import template
from qtune.model.adapt import load_trained
from qtune.model.calibrated import calibrated_place, is_calibrated
from qtune.model.forward import inner_model
from qtune.model.kv_cache import packed_cache
from qtune.model.load import load_base, load_tokenizer, register
from qtune.model.sources import resolve
from qtune.recipe_data import Data, sources
from qtune.run_folder import CALIBRATION, RunFolder

HELP = """\
/reset starts over, /system TEXT starts over with that system message (none without TEXT),
/quit or Ctrl-D ends, Ctrl-C stops an answer.
"""

Read = Callable[[str], str]
Write = Callable[[str], None]


@dataclass
class Partner:
    """A model to talk to, and the system message that a conversation with it starts with.

    `kv_bits` are those of its keys and values; None: they are as the model makes them.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    system: str = ""
    kv_bits: int | None = None

    def reply(self, messages: list[Message], write: Write, max_new_tokens: int) -> str:
        """The assistant's next message, sent to `write` as it comes; shorter after Ctrl-C."""
        device = inner_model(self.model).device
        ids = torch.tensor([prompt_ids(self.tokenizer, messages)], device=device)
        pieces = _Pieces(self.tokenizer, write)
        stops, live = stop_ids(self.model, self.tokenizer), torch.ones_like(ids)
        config = inner_model(self.model).config
        cache = packed_cache(config, self.kv_bits) if self.kv_bits else None
        with measuring(self.model):
            try:
                generate_ids(self.model, ids, live, stops, max_new_tokens, pieces, cache)
            except KeyboardInterrupt:
                pieces.end()  # type: ignore[no-untyped-call]
        return pieces.text


def talk(source: str, kv_bits: int | None = None) -> None:
    """Chat in the terminal with a model or run folder. Raises UserError where there is none."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    partner = open_partner(source, device, report=print)
    partner.kv_bits = kv_bits
    chat(partner, input, _to_terminal)


def chat(partner: Partner, read: Read, write: Write, *, max_new_tokens: int = 512) -> None:
    """Answer through `write` what `read(prompt)` returns, until /quit or the end of input."""
    write(HELP)
    messages = _opening(partner, write)
    while (line := _next_line(read)) is not None:
        command, _, text = line.partition(" ")
        if command in ("/reset", "/system"):
            partner.system = text.strip() if command == "/system" else partner.system
            messages = _opening(partner, write)
        elif command.startswith("/"):
            write(f"unknown command {command}\n{HELP}")
        elif line:
            messages.append({"role": "user", "content": line})
            reply = partner.reply(messages, write, max_new_tokens)
            messages.append({"role": "assistant", "content": reply})


def open_partner(source: str, device: torch.device, report: Callable[[str], None]) -> Partner:
    """The model of a run folder (quantized base and adapter), or any model that a recipe can name.

    Raises UserError where there is neither, where the run has no adapter yet, and where it was
    trained with another chat template than the one that is there now.
    """
    register()
    if (Path(source) / "recipe.yaml").is_file():
        return _open_run(Path(source), device, report)
    folder = resolve(source, report=report)
    return Partner(load_base(folder, None, device=device), load_tokenizer(folder))


def _open_run(path: Path, device: torch.device, report: Callable[[str], None]) -> Partner:
    run = run_folder.open_run(path)
    recipe = run.recipe
    if not (run.adapter / "adapter_config.json").is_file():
        raise UserError(
            f"{path} holds no adapter: its training has not ended; go on with "
            f"`qtune train {path / 'recipe.yaml'} --resume`, or `qtune chat {recipe.model}`"
        )
    folder = resolve(recipe.model, revision=recipe.revision, report=report)
    trust: dict[str, Any] = {"trust_remote_code": recipe.trust_remote_code}
    tokenizer = load_tokenizer(folder, **trust)
    use_template(tokenizer, recipe.data.template)
    template.check(run.adapter, tokenizer)
    base = load_base(_stored_base(folder, run), recipe.quant, device=device, **trust)
    model = load_trained(base, run.adapter)
    return Partner(model, tokenizer, _system_message(recipe.data, report))


def _stored_base(folder: Path, run: RunFolder) -> Path:
    """The folder of the base that the run was trained on; UserError: it is there no more."""
    if not is_calibrated(run.recipe):
        return folder
    place = calibrated_place(folder, run.recipe, run.read(CALIBRATION)["sha256"])
    if not place.is_dir():
        raise UserError(
            f"the base of {run.path}, calibrated with its data, is not in the cache any more; "
            f"`qtune eval {run.path}` makes it again"
        )
    return place


def _system_message(data: Data, report: Callable[[str], None]) -> str:
    """The system message of the first row; empty where it has none or the data is gone, said so."""
    held_out = None if isinstance(data.validation, float) else data.validation
    source = sources(data.test or held_out or data.train)[0]
    try:
        first = load_rows(replace(source, rows=1))[0].messages[0]
    except UserError as error:
        report(f"starting without the system message of the run's data: {error}")
        return ""
    return str(first["content"]) if first["role"] == "system" else ""


class _Pieces(TextStreamer):
    """Hands on text as soon as it is whole words, and keeps it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Write) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text = ""
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers with each piece, and with the rest at the end."""
        self.text += text
        self._write(text + "\n" if stream_end else text)


def _opening(partner: Partner, write: Write) -> list[Message]:
    """The messages a new conversation starts with, which are also shown."""
    if not partner.system:
        return []
    write(f"(system: {partner.system})\n")
    return [{"role": "system", "content": partner.system}]


def _next_line(read: Read) -> str | None:
    """What the user typed, None for the end of the conversation."""
    try:
        line = read("> ").strip()
    except (EOFError, KeyboardInterrupt):
        return None
    return None if line == "/quit" else line


def _to_terminal(text: str) -> None:
    print(text, end="", flush=True)
