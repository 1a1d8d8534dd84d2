"""Local files of rows: which files a path means, and the reader of each.

A path is a file, a pattern such as `data/*.jsonl`, or a folder: one that `datasets` saved, or one
of data files. A folder may hold several splits, by the names of its files or of the folders in it;
`folder:train` takes one. Without a name such a folder is refused, or rows to be tested on would be
trained on.
"""

import difflib
import json
import re
from pathlib import Path
from typing import Any

from qtune.data.readers import arrow, delimited, json_lines, json_list, text
from qtune.data.records import Reader
from qtune.errors import UserError

READERS: dict[str, Reader] = {
    ".jsonl": json_lines.read,
    ".json": json_list.read,
    ".csv": delimited.read,
    ".tsv": delimited.read,
    ".parquet": arrow.read_parquet,
    ".arrow": arrow.read_arrow,
    ".txt": text.read,
    ".md": text.read,
}
_SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval")


def find(path: Path) -> list[Path]:
    """The files that a path means, in a fixed order; none where it cannot be a local one.

    Raises UserError where a file is missing, or where it is not clear which files are meant.
    """
    if "*" in str(path):
        return _matching(path)
    if path.is_dir():
        return _in_folder(path, None)
    folder, _, split = str(path).rpartition(":")
    if folder and not path.exists() and Path(folder).is_dir():
        return _in_folder(Path(folder), split)
    if not path.exists():
        if path.suffix in READERS:
            raise UserError(missing(path))
        return []
    if path.suffix not in READERS:
        raise UserError(f"{path}: unknown kind of file; use {', '.join(READERS)}")
    return [path]


def missing(path: Path) -> str:
    """What to say of a path where nothing is."""
    folder = path.parent
    if not folder.is_dir():
        return f"{path}: no such file, and no folder {folder}"
    names = sorted(p.name for p in folder.iterdir())
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(close)}?" if close else f" in {folder.absolute()}"
    return f"{path}: no such file{hint}"


def _matching(pattern: Path) -> list[Path]:
    root = Path(pattern.anchor)
    relative = pattern.relative_to(root) if pattern.anchor else pattern
    found = sorted(p for p in root.glob(str(relative)) if p.is_file() and p.suffix in READERS)
    if not found:
        raise UserError(f"{pattern}: no file of data has such a name; use {', '.join(READERS)}")
    return found


def _in_folder(folder: Path, split: str | None) -> list[Path]:
    if (folder / "dataset_dict.json").exists():
        return _saved(folder / _saved_split(folder, split))
    if (folder / "state.json").exists() and split is None:
        return _saved(folder)
    files = sorted(p for p in folder.rglob("*") if _is_data(p.relative_to(folder)))
    kinds = sorted({p.suffix for p in files})
    if not files:
        raise UserError(f"{folder}: holds no files of data; use {', '.join(READERS)}")
    if len(kinds) > 1:
        raise UserError(
            f"{folder}: holds files of several kinds ({', '.join(kinds)}); name those that are "
            f"meant, as in {folder}/*{kinds[0]}"
        )
    return _of_split(folder, files, split)


def _is_data(path: Path) -> bool:
    hidden = any(part.startswith((".", "_")) for part in path.parts)
    # Descriptions that data sets come with are no rows.
    described = path.name in ("README.md", "dataset_info.json", "dataset_infos.json", "LICENSE.txt")
    return path.suffix in READERS and not hidden and not described


def _of_split(folder: Path, files: list[Path], split: str | None) -> list[Path]:
    """The files of a split; all of them where none is named and there is only one."""
    words = {file: _words(file.relative_to(folder)) for file in files}
    there = [name for name in _SPLITS if any(name in found for found in words.values())]
    if split is None and len(there) > 1:
        raise UserError(
            f"{folder}: holds the splits {', '.join(there)}; name one, as in {folder}:{there[0]}"
        )
    taken = [file for file in files if split is None or split in words[file]]
    if not taken:
        names = ", ".join(there) or ", ".join(file.name for file in files[:5])
        raise UserError(f"{folder}: no file of a split '{split}'; there are {names}")
    return taken


def _words(path: Path) -> set[str]:
    return set(re.split(r"[^a-zA-Z0-9]+", str(path)))


def _saved_split(folder: Path, split: str | None) -> str:
    """The split of a saved DatasetDict that is meant."""
    names: list[str] = _json(folder / "dataset_dict.json")["splits"]
    if split in names:
        return str(split)
    if split is None and len(names) == 1:
        return names[0]
    problem = f"has no split '{split}'" if split else "holds several splits"
    raise UserError(
        f"{folder}: {problem}; name one of {', '.join(names)}, as in {folder}:{names[0]}"
    )


def _saved(folder: Path) -> list[Path]:
    """The files of a data set that `datasets` saved."""
    names = [str(data["filename"]) for data in _json(folder / "state.json")["_data_files"]]
    absent = [name for name in names if not (folder / name).exists()]
    if absent:
        raise UserError(f"{folder}: lacks {absent[0]}, which its state.json names; save it again")
    return [folder / name for name in names]


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); save the data again") from error
