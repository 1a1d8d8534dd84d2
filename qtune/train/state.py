"""Checkpoints on disk: what a run needs to go on as if it had never stopped.

A checkpoint is a folder of safetensors files (`train/tensors.py` says what is in them) and
state.json: the step, the hash of the data, what the feed and the watch need, and the SHA-256 of
everything there. It is written under a temporary name and renamed, and renamed back before it is
removed, so a folder called step-* is complete; what a killed run left under a temporary name goes
with the next save. A folder that is not what was written, after a crash of the machine say, is
named and passed over for the one before it. The learning rate is a pure function of the step and
needs no state.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qtune.data.feed import Feed
from qtune.errors import UserError
from qtune.progress import say


@dataclass(frozen=True)
class State:
    """Where a run stands, and on which data and how many processes."""

    data_sha256: str
    num_processes: int
    step: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0
    looked: int = 0
    """The last step after which held-out loss and samples were made, where they were due."""
    stopped: bool = False
    """Whether patience ended the run before its last step."""
    feed: dict[str, Any] = field(default_factory=dict)
    watch: dict[str, Any] = field(default_factory=dict)


def fresh(feed: Feed, num_processes: int) -> State:
    """The state of a run on this feed before its first step."""
    return State(feed.sha256, num_processes)


def resumed(folder: Path, start: State, *, other_data: bool = False) -> State:
    """The state of the last whole checkpoint in `folder`, or `start` where there is none at all.

    Damaged checkpoints are named on the terminal. Raises UserError where none of them is whole, and
    for one of other data, unless `other_data` allows that.
    """
    state = _last_whole(folder)
    if state is None:
        return start
    if state.data_sha256 != start.data_sha256 and not other_data:
        raise UserError(
            f"cannot resume {place(folder, state.step)}: the training data has changed; start a "
            "new run, or go on with the new data by --allow data"
        )
    if state.num_processes != start.num_processes:
        say(
            f"note: {place(folder, state.step)} was written by {state.num_processes} processes "
            f"and goes on with {start.num_processes}: losses will agree with an uninterrupted run "
            "to rounding, not in every bit, and dropout draws other numbers"
        )
    return replace(state, num_processes=start.num_processes, data_sha256=start.data_sha256)


def save(
    folder: Path, state: State, tensors: Mapping[str, Mapping[str, Tensor]], keep: int
) -> Path:
    """The new checkpoint's folder `folder`/step-N, with a file for each of `tensors`.

    Older ones than the last `keep` are removed, and those of later steps: this run has not come
    from them. Raises UserError where the disk is full or cannot be written.
    """
    final = place(folder, state.step)
    for left in folder.glob(".step-*"):
        shutil.rmtree(left)
    made = folder / f".{final.name}.{os.getpid()}"
    try:
        _write(made, state, tensors)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"the checkpoint {final} cannot be written ({error}); free some of its disk, then go "
            "on with --resume"
        ) from error
    if final.exists():
        _remove(final)
    made.rename(final)
    own = [path for path in checkpoints(folder) if _number(path) <= state.step]
    for old in {*checkpoints(folder)} - {*own[-keep:]}:
        _remove(old)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob("step-*"), key=_number)


def place(folder: Path, step: int) -> Path:
    """The folder of the checkpoint after a step."""
    return folder / f"step-{step:06d}"


def read(checkpoint: Path) -> State:
    """The state of a checkpoint; raises UserError unless all its files are as they were written."""
    try:
        saved = dict(json.loads((checkpoint / "state.json").read_text(encoding="utf-8")))
        if saved.pop("sha256") != _seal(saved):
            raise ValueError("it is not what was written")
        sums = saved.pop("files")
        state = State(**saved)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{checkpoint / 'state.json'} is corrupt ({error})") from error
    for name, expected in sums.items():
        path = checkpoint / name
        if not path.is_file() or _sha256(path) != expected:
            raise UserError(f"{path} is corrupt: it is not what was written")
    return state


def load(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """The tensors that were saved as `name`; none where it was not among them."""
    path = checkpoint / f"{name}.safetensors"
    try:
        return load_file(path) if path.exists() else {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _last_whole(folder: Path) -> State | None:
    """The state of the last checkpoint that is whole; None where there is none of any kind."""
    damages: list[str] = []
    for checkpoint in reversed(checkpoints(folder)):
        try:
            state = read(checkpoint)
        except UserError as damage:
            damages.append(str(damage))
            continue
        for text in damages:
            say(f"note: {text}; going on from {checkpoint}")
        return state
    if damages:
        raise UserError(
            "\n".join(damages) + f"\nno whole checkpoint is left in {folder}, and a run is not "
            f"started over without being asked: remove {folder.parent} to do so"
        )
    return None


def _write(made: Path, state: State, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    made.mkdir(parents=True)
    for name, values in tensors.items():
        save_file(dict(values), made / f"{name}.safetensors")
    sums = {path.name: _sha256(path) for path in sorted(made.glob("*.safetensors"))}
    content = {**asdict(state), "files": sums}
    sealed = {**content, "sha256": _seal(content)}
    (made / "state.json").write_text(json.dumps(sealed, indent=1), encoding="utf-8")


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint so that half of one never has its name."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.{os.getpid()}.old")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def _number(checkpoint: Path) -> int:
    digits = checkpoint.name.removeprefix("step-")
    return int(digits) if digits.isdigit() else -1


def _seal(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
