"""What in an exported folder is nobody else's business: keys, and folders of this machine.

Keys are looked for in every text file. Folders are looked for where such folders get to: in the
values of configurations, not in the requests of golden prompts or a tokenizer's vocabulary, which
hold what they hold.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qtune.export.folder import fingerprint, template
from qtune.model.folder import read_json
from qtune.serving.difference import Difference

_TEXTS = (".json", ".md", ".txt", ".jinja", ".py", ".yaml", ".toml", ".cfg")
_KEYS = re.compile(
    r"\b(hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{32,}|gh[pousr]_[A-Za-z0-9]{36,}"
    r"|github_pat_\w{50,}|AKIA[0-9A-Z]{16}|AIza[\w-]{35}|xox[baprs]-[\w-]{20,})\b"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_FOLDER = re.compile(r"(~|[A-Za-z]:)?[/\\](?![/\\])\S+")
# of qtune.json: texts from data, and sums
_DATA = ("golden", "tokenizer", "files", "modules", "recipe")


def found(folder: Path) -> list[Difference]:
    """Keys and folders of this machine, by file."""
    return list(_keys(folder)) + list(_folders(folder))


def _keys(folder: Path) -> Iterator[Difference]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in _TEXTS:
            for match in _KEYS.finditer(path.read_text(encoding="utf-8", errors="replace")):
                name = path.relative_to(folder).as_posix()
                yield Difference(name, f"holds what looks like a key: {match[0][:8]}...")


def _folders(folder: Path) -> Iterator[Difference]:
    for path in sorted(folder.rglob("*.json")):
        if path.name not in (*fingerprint.CONFIGS, template.NAME):
            continue
        values = read_json(path)
        if path.name == template.NAME:
            values = {key: value for key, value in values.items() if key not in _DATA}
        for key, value in _strings(values):
            if _FOLDER.fullmatch(value):
                name = path.relative_to(folder).as_posix()
                yield Difference(name, f"{key} is a folder of this machine: {json.dumps(value)}")


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """All texts in a JSON value, with their keys."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _strings(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _strings(inner, f"{key}[{i}]")
