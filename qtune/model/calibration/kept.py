"""What calibration has found so far, on the disk: an interrupted one goes on with the next block.

A block counts as finished once its figures are there, which are written last; beside them lie its
tensors and the hidden states behind it. Of these only the last ones are kept.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qtune.errors import UserError
from qtune.files import write_text
from qtune.model.calibration.block import Outcome


@dataclass(frozen=True)
class Kept:
    """The folder of finished blocks."""

    folder: Path

    def num_blocks(self) -> int:
        """How many blocks are finished."""
        return len(list(self.folder.glob("figures-*.json")))

    def hidden(self, device: torch.device) -> list[Tensor]:
        """The hidden states behind the last finished block, one tensor a row."""
        tensors = load_file(self._path("hidden", self.num_blocks() - 1))
        return [tensors[str(i)].to(device) for i in range(len(tensors))]

    def add(self, outcome: Outcome, hidden: list[Tensor]) -> None:
        """Keep what was found for the next block; UserError: the disk takes no more."""
        number = self.num_blocks()
        self.folder.mkdir(parents=True, exist_ok=True)
        starts = {f"{name}.{i}": t for name, ab in outcome.starts.items() for i, t in enumerate(ab)}
        self._save("tensors", number, outcome.tensors)
        self._save("starts", number, starts)
        self._save("hidden", number, {str(i): row for i, row in enumerate(hidden)})
        figures = [asdict(figures) for figures in outcome.figures]
        write_text(self._path("figures", number, "json"), json.dumps(figures))
        self._path("hidden", number - 1).unlink(missing_ok=True)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of everything that is quantized, block by block."""
        for number in range(self.num_blocks()):
            yield from sorted(load_file(self._path("tensors", number)).items())

    def starts(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A and B of the adapters' starts, by the names of their layers."""
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for number in range(self.num_blocks()):
            tensors = load_file(self._path("starts", number))
            names = {name.removesuffix(".0") for name in tensors if name.endswith(".0")}
            found |= {n: (tensors[f"{n}.0"], tensors[f"{n}.1"]) for n in sorted(names)}
        return found

    def figures(self) -> list[dict[str, Any]]:
        """The figures of all layers."""
        files = (self._path("figures", n, "json") for n in range(self.num_blocks()))
        return [layer for file in files for layer in json.loads(file.read_text("utf-8"))]

    def _save(self, what: str, number: int, tensors: dict[str, Tensor]) -> None:
        path = self._path(what, number)
        here = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            save_file(here, path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be written ({error}); is the disk full?") from error

    def _path(self, what: str, number: int, kind: str = "safetensors") -> Path:
        return self.folder / f"{what}-{number:05}.{kind}"
