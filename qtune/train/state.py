"""Checkpoints: what a run needs to go on as if it had never stopped.

A checkpoint is a folder with the trained tensors, the optimizer's and the random number state of
each process (safetensors), and state.json: the step, the hash of the data, and the SHA-256 of
everything there. It is written under a temporary name and renamed, so a folder called step-* is
complete; what a killed run left under such a name goes with the next save. The order of samples and
the learning rate are pure functions of the step and need no state.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qtune.data.chat import Sample
from qtune.errors import UserError


@dataclass(frozen=True)
class State:
    """Where a run stands, and on which data and how many processes."""

    data_sha256: str
    num_processes: int
    step: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0


def save(
    folder: Path,
    state: State,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rng: list[Tensor],
    keep: int,
) -> Path:
    """The new checkpoint's folder `folder`/step-N; older ones than the last `keep` are removed."""
    final = folder / f"step-{state.step:06d}"
    for left in folder.glob(".step-*"):
        shutil.rmtree(left)
    made = folder / f".{final.name}.{os.getpid()}"
    made.mkdir(parents=True)
    save_file(_trainable(model), made / "adapter.safetensors")
    save_file(_optimizer_tensors(model, optimizer), made / "optimizer.safetensors")
    save_file({f"rank_{i}": t for i, t in enumerate(rng)}, made / "rng.safetensors")
    sums = {path.name: _sha256(path) for path in sorted(made.glob("*.safetensors"))}
    content = {**asdict(state), "files": sums}
    sealed = {**content, "sha256": _seal(content)}
    (made / "state.json").write_text(json.dumps(sealed, indent=1), encoding="utf-8")
    shutil.rmtree(final, ignore_errors=True)
    made.rename(final)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def fresh(samples: Sequence[Sample], num_processes: int) -> State:
    """The state of a run on these samples before its first step."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(repr((sample.ids, sample.supervised)).encode())
    return State(digest.hexdigest(), num_processes)


def resumed(folder: Path, start: State) -> State:
    """The state of the last checkpoint in `folder`, or `start` where there is none.

    Raises UserError for a damaged checkpoint and one of other data or another number of processes.
    """
    found = checkpoints(folder)
    if not found:
        return start
    state = read(found[-1])
    if state.data_sha256 != start.data_sha256:
        raise UserError(
            f"cannot resume {found[-1]}: the training data has changed; start a new run"
        )
    if state.num_processes != start.num_processes:
        raise UserError(
            f"cannot resume {found[-1]} with {start.num_processes} processes: "
            f"it was written with {state.num_processes}"
        )
    return state


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    # beyond six digits names grow
    return sorted(folder.glob("step-*"), key=lambda path: (len(path.name), path.name))


def read(checkpoint: Path) -> State:
    """The state of a checkpoint; raises UserError unless all its files are as they were written."""
    advice = f"remove {checkpoint} to resume from the checkpoint before it"
    try:
        saved = dict(json.loads((checkpoint / "state.json").read_text(encoding="utf-8")))
        if saved.pop("sha256") != _seal(saved):
            raise ValueError("it is not what was written")
        sums = saved.pop("files")
        state = State(**saved)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{checkpoint / 'state.json'} is corrupt ({error}); {advice}") from error
    for name, expected in sums.items():
        path = checkpoint / name
        if not path.is_file() or _sha256(path) != expected:
            raise UserError(f"{path} is corrupt: it is not what was written; {advice}")
    return state


def restore(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put the checkpoint's tensors into model and optimizer; `read` has checked the files."""
    saved = _load(checkpoint / "adapter.safetensors")
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if saved.keys() != own.keys():
        differing = sorted(saved.keys() ^ own.keys())[:3]
        raise UserError(f"{checkpoint} holds another adapter: {', '.join(differing)} differ")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(saved[name])
    moments = _load(checkpoint / "optimizer.safetensors")
    for name, parameter in own.items():
        prefix = name + "::"
        optimizer.state[parameter] = {
            key.removeprefix(prefix): t if t.ndim == 0 else t.to(parameter.device)
            for key, t in moments.items()
            if key.startswith(prefix)
        }


def rng_state(device: torch.device) -> Tensor:
    """State of the random number generator that dropout draws from, uint8."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def restore_rng(checkpoint: Path, rank: int, device: torch.device) -> None:
    """Set this process's random number generator to where the checkpoint left it."""
    saved = _load(checkpoint / "rng.safetensors")[f"rank_{rank}"]
    if device.type == "cuda":
        torch.cuda.set_rng_state(saved, device)
    else:
        torch.set_rng_state(saved)


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().cpu() for n, p in model.named_parameters() if p.requires_grad}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors as `parameter::key`."""
    return {
        f"{name}::{key}": value.cpu()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _seal(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
