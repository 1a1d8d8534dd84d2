"""Local files of rows: JSON lines, a JSON list, Parquet.

The text formats are parsed here rather than by a library because an error has to name the line and
column of the file. Rows are numbered by line (text) or by position (Parquet), from 1.
"""

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qtune.data.rows import Problems
from qtune.errors import UserError

Numbered = Iterator[tuple[int, Any]]


def read(path: Path, problems: Problems) -> Numbered:
    """Yield (number, parsed value) of every row; syntax mistakes go to `problems`.

    Raises UserError where the file is missing, unreadable, not UTF-8 or of an unknown kind.
    """
    if not path.exists():
        raise UserError(_missing(path))
    if path.is_dir():
        names = ", ".join(sorted(p.name for p in path.iterdir() if p.suffix in READERS)[:5])
        raise UserError(f"{path}: is a folder; name a file in it" + (f": {names}" * bool(names)))
    if path.suffix not in READERS:
        raise UserError(f"{path}: unknown kind of file; use {', '.join(READERS)}")
    return READERS[path.suffix](path, problems)


def _missing(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"{path}: no such file, and no folder {folder}"
    names = sorted(p.name for p in folder.iterdir())
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(close)}?" if close else f" in {folder.absolute()}"
    return f"{path}: no such file{hint}"


def _text(path: Path) -> str:
    """The file's text without a byte order mark."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}:{line}: not UTF-8 (byte 0x{data[error.start]:02x}); save the file as UTF-8"
        ) from error


def _json_lines(path: Path, problems: Problems) -> Numbered:
    # Not splitlines(): JSON strings may hold U+2028 and other characters it would break at.
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            problems.add(f"{path}:{number}:{error.colno}", f"not valid JSON: {error.msg}")
            continue
        yield number, value


def _json_list(path: Path, problems: Problems) -> Numbered:
    text = _text(path)
    at = _skip_space(text, 0)
    if text[at : at + 1] != "[":
        if text.strip():
            problems.add(f"{path}:1", "must be a list of rows; one object per line goes in .jsonl")
        return
    line, counted = 1, 0
    at = _skip_space(text, at + 1)
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = json.JSONDecoder().raw_decode(text, at)
            yield line, value
            at = _next_item(text, at)
        except json.JSONDecodeError as error:
            problems.add(f"{path}:{error.lineno}:{error.colno}", f"not valid JSON: {error.msg}")
            return


def _next_item(text: str, at: int) -> int:
    """Where the next item of a list begins, or its closing bracket."""
    at = _skip_space(text, at)
    if text[at : at + 1] == "]":
        return at
    if text[at : at + 1] != ",":
        raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
    after = _skip_space(text, at + 1)
    if text[after : after + 1] == "]":
        raise json.JSONDecodeError("a comma before the closing bracket", text, at)
    return after


def _skip_space(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\t", "\n", "\r"):
        at += 1
    return at


def _parquet(path: Path, problems: Problems) -> Numbered:
    # Imported here: the package takes a while, and text files do without it.
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file: {error}") from error
    number = 0
    for batch in table.iter_batches():
        for value in batch.to_pylist():
            number += 1
            yield number, value


READERS = {".jsonl": _json_lines, ".json": _json_list, ".parquet": _parquet}
