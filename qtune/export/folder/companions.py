"""The files that go with the weights: tokenizer, chat template, generation config, config, licence.

The tokenizer's files are copied, not saved again: transformers 5 writes class names that older
libraries do not know. Only the chat template in them is replaced by the one that was trained with.
Generation stops where answers in the training data end, which a base's own generation config often
leaves out.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from qtune.data.chat import end_of_turn
from qtune.export.folder import template
from qtune.model.folder import read_json

_TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "spiece.model", "*.tiktoken",
)  # fmt: skip
_LEGAL = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
# Python files of models that bring their own code
_CODE = ("*.py",)
_GENERATION = "generation_config.json"
_NUMBERS = re.compile(r"\[\n([-\d.eE+,\s]+)\]")


def write(base_folder: Path, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Put everything but weights and config.json into `folder`."""
    for pattern in (*_TOKENIZER, *_LEGAL, *_CODE):
        for path in base_folder.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
    if (base_folder / "README.md").is_file():
        shutil.copyfile(base_folder / "README.md", folder / "README.base.md")
    template.write_text(folder, tokenizer)
    _replace_old_template(folder / "tokenizer_config.json", tokenizer)
    write_json(folder / _GENERATION, generation_config(base_folder, tokenizer))


def write_config(base_folder: Path, folder: Path, changes: dict[str, Any]) -> None:
    """Write the base's config.json with `changes`, without what says how the base was stored."""
    config = read_json(base_folder / "config.json")
    for stale in ("quantization_config", "torch_dtype", "_name_or_path"):
        config.pop(stale, None)
    write_json(folder / "config.json", config | changes)


def generation_config(base_folder: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The base's generation settings, stopping at every id that ends an answer."""
    path = base_folder / _GENERATION
    settings = read_json(path) if path.is_file() else {}
    stops = stop_ids(tokenizer, settings.get("eos_token_id"))
    settings["eos_token_id"] = stops[0] if len(stops) == 1 else stops
    for key in ("bos_token_id", "pad_token_id"):
        if settings.get(key) is None and getattr(tokenizer, key) is not None:
            settings[key] = getattr(tokenizer, key)
    return settings


def stop_ids(tokenizer: PreTrainedTokenizerBase, known: int | list[int] | None = None) -> list[int]:
    """Ids that end an answer: `known`, the tokenizer's end, and the template's after a turn."""
    stops = [known] if isinstance(known, int) else list(known or [])
    if tokenizer.eos_token_id is not None:
        stops.append(tokenizer.eos_token_id)
    turn_end = end_of_turn(tokenizer) if tokenizer.chat_template else None
    if turn_end is not None:
        stops.append(turn_end)
    return list(dict.fromkeys(stops))


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write an object as readable JSON, lists of numbers on one line each."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    # a string holds no line break as such, so this meets lists only
    text = _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text)
    path.write_text(text + "\n", encoding="utf-8")


def _replace_old_template(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Put the trained template where libraries from before chat_template.jinja look for it."""
    config = read_json(path) if path.is_file() else {}
    old = config.get("chat_template")
    if old is not None and old != tokenizer.chat_template:
        write_json(path, config | {"chat_template": tokenizer.chat_template})
