"""The tensors of a model folder one at a time, and their names in the loaded model.

Merge and export read the weights from the folder instead of the model: what training left alone
passes through bit for bit, and one tensor at a time is in memory. Names are those of the files,
which other libraries know.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from qtune.errors import UserError
from qtune.model.folder import read_json


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers would load, in order."""
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    places = read_json(folder / "model.safetensors.index.json")["weight_map"]
    return [folder / name for name in sorted(set(places.values()))]


def stored_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor, on the CPU and in the stored dtype, of all weights in the folder."""
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (the file is no mapping)
                yield name, file.get_tensor(name)


def stored_names(folder: Path) -> dict[str, Path]:
    """The file that holds each tensor."""
    found = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            found.update(dict.fromkeys(file.keys(), path))
    return found


def stored_tensor(path: Path, name: str) -> Tensor:
    """One tensor, on the CPU and in the stored dtype, of one weight file."""
    with safe_open(path, framework="pt") as file:
        found: Tensor = file.get_tensor(name)
    return found


def tensors_beside(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that may be missing: none then. Raises UserError for a damaged one."""
    try:
        return load_file(path) if path.exists() else {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype that the folder's config names, or else that of its first float tensor."""
    config = read_json(folder / "config.json")
    named = config.get("dtype") or config.get("torch_dtype")
    if isinstance(named, str):
        found: torch.dtype = getattr(torch, named.removeprefix("torch."))
        return found
    return next(tensor.dtype for _, tensor in stored_tensors(folder) if tensor.is_floating_point())


@dataclass(frozen=True)
class Names:
    """How the tensors of a folder are called in the model that was loaded from it, without PEFT's
    wrappers.

    `parameters` are the model's own names, `prefix` that of its body (`model.`), which folders
    saved without a head lack, and `tied` maps a parameter to the one whose tensor it shares.
    """

    parameters: frozenset[str]
    prefix: str
    tied: dict[str, str]

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Names":
        """The names of a model, with or without adapters in it."""
        own = frozenset(
            bare_name(name) for name, _ in model.named_parameters(remove_duplicate=False)
        )
        tied: dict[str, Any] = getattr(model, "all_tied_weights_keys", None) or {}
        return cls(own, f"{model.base_model_prefix}.", dict(tied))

    def in_model(self, stored: str) -> str:
        """The model's name for a stored tensor; one that the model does not have keeps its own."""
        longer = self.prefix + stored
        return longer if stored not in self.parameters and longer in self.parameters else stored

    def group(self, name: str) -> list[str]:
        """All parameters that share the tensor of `name`, its owner first."""
        owner = self.tied.get(name, name)
        return [owner, *(other for other, source in self.tied.items() if source == owner)]


def distinct_tensors(folder: Path, names: Names) -> Iterator[tuple[str, str, Tensor]]:
    """Stored name, name in the model and tensor of all weights; of tied ones only the owner's."""
    present = {names.in_model(stored) for stored in stored_names(folder)}
    for stored, tensor in stored_tensors(folder):
        name = names.in_model(stored)
        owner = next(other for other in names.group(name) if other in present)
        if name == owner:
            yield stored, name, tensor


def bare_name(name: str) -> str:
    """A parameter's name without the wrappers that PEFT puts around its layer."""
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")
