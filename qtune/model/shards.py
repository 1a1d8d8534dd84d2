"""Safetensors files of limited size, written while the tensors come in.

At most one shard is in memory. How many there will be is known at the end, so they get their names
then.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from qtune.errors import UserError

SHARD_BYTES = 2_000_000_000


def write_shards(
    tensors: Iterable[tuple[str, Tensor]], folder: Path, *, shard_bytes: int = SHARD_BYTES
) -> int:
    """Bytes of all tensors, now in `model.safetensors` or in numbered shards with their index.

    Raises UserError where the disk takes no more.
    """
    shards = Shards(folder, shard_bytes)
    for name, tensor in tensors:
        shards.add(name, tensor)
    shards.finish()
    return shards.total_bytes


@dataclass
class Shards:
    """Tensors on their way into `folder`: `add` each, then `finish`.

    Both raise UserError where the disk takes no more.
    """

    folder: Path
    shard_bytes: int = SHARD_BYTES
    total_bytes: int = 0
    _written: list[list[str]] = field(default_factory=list)
    _pending: dict[str, Tensor] = field(default_factory=dict)
    _pending_bytes: int = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor, which is not to be changed any more."""
        taken = {name for names in self._written for name in names}
        assert name not in self._pending and name not in taken, f"{name} is written twice"
        if self._pending and self._pending_bytes + tensor.nbytes > self.shard_bytes:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes

    def finish(self) -> None:
        """All tensors are in `model.safetensors` or in numbered shards with their index."""
        self._flush()
        num_shards = len(self._written)
        if num_shards == 1:
            self._part(0).rename(self.folder / "model.safetensors")
            return
        places = {}
        for number, names in enumerate(self._written):
            file = f"model-{number + 1:05}-of-{num_shards:05}.safetensors"
            self._part(number).rename(self.folder / file)
            places.update(dict.fromkeys(names, file))
        index = {
            "metadata": {"total_size": self.total_bytes},
            "weight_map": dict(sorted(places.items())),
        }
        (self.folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2) + "\n", encoding="utf-8"
        )

    def _flush(self) -> None:
        path = self._part(len(self._written))
        try:
            save_file(self._pending, path, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be written ({error}); is the disk full?") from error
        self._written.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number}.safetensors"
