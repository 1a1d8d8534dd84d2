"""Safetensors files of limited size, written while the tensors come in.

At most one shard is in memory. How many there will be is known at the end, so they get their names
then.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from qtune.errors import UserError

SHARD_BYTES = 2_000_000_000


def write_shards(
    tensors: Iterator[tuple[str, Tensor]], folder: Path, *, shard_bytes: int = SHARD_BYTES
) -> int:
    """Bytes of all tensors, now in `model.safetensors` or in numbered shards with their index.

    Raises UserError where the disk takes no more.
    """
    shards = _Shards(folder)
    for name, tensor in tensors:
        if shards.pending and shards.pending_bytes + tensor.nbytes > shard_bytes:
            shards.flush()
        shards.add(name, tensor)
    shards.finish()
    return shards.total_bytes


@dataclass
class _Shards:
    folder: Path
    written: list[list[str]] = field(default_factory=list)
    pending: dict[str, Tensor] = field(default_factory=dict)
    pending_bytes: int = 0
    total_bytes: int = 0

    def add(self, name: str, tensor: Tensor) -> None:
        taken = {name for names in self.written for name in names}
        assert name not in self.pending and name not in taken, f"{name} is written twice"
        self.pending[name] = tensor.contiguous()
        self.pending_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes

    def flush(self) -> None:
        path = self._part(len(self.written))
        try:
            save_file(self.pending, path, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be written ({error}); is the disk full?") from error
        self.written.append(list(self.pending))
        self.pending, self.pending_bytes = {}, 0

    def finish(self) -> None:
        self.flush()
        num_shards = len(self.written)
        if num_shards == 1:
            self._part(0).rename(self.folder / "model.safetensors")
            return
        places = {}
        for number, names in enumerate(self.written):
            file = f"model-{number + 1:05}-of-{num_shards:05}.safetensors"
            self._part(number).rename(self.folder / file)
            places.update(dict.fromkeys(names, file))
        index = {
            "metadata": {"total_size": self.total_bytes},
            "weight_map": dict(sorted(places.items())),
        }
        (self.folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2) + "\n"
        )

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number}.safetensors"
