"""The quantized form of a model folder, made once and kept, for the processes that share it.

Each process could quantize for itself, but then each reads all 16-bit weights, computes the same
codes and holds them for itself. Here the first one quantizes, the others wait. On a CPU they then
map the same pages of the same files; under fsdp each reads its slices (`sharded.py`).

transformers reads, merges and converts the tensors as for any model, so the codes are those that
loading gives, bit for bit. Only what comes out of the quantizer goes to the disk at once instead of
into the model: memory holds one tensor and one small shard.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from qtune.cache import build_once, need_space
from qtune.model.cache import model_folder
from qtune.model.checkpoint import weight_files
from qtune.model.folder import is_quantized, read_json
from qtune.model.load import check_needs_no_text, load_complete, register
from qtune.model.quant_config import QtuneConfig
from qtune.model.quantizer import QtuneQuantizer
from qtune.model.shards import Shards
from qtune.recipe import Quant

# part of every folder's name: raised when codes or names become others
VERSION = 1
SHARD_BYTES = 250_000_000
# of the 16-bit folder's size, in 8 bits with scales and with embeddings as they are
MOST_SHARE = 0.6
# what goes along: settings, and Python files of models that bring their own code
COMPANIONS = ("generation_config.json", "*.py")


def quantized_folder(
    folder: Path,
    quant: Quant,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    trust_remote_code: bool = False,
) -> Path:
    """A folder of the same model with its linear layers quantized; the same one where they are.

    Computed on `device`. What is not quantized is stored in `dtype`. Raises UserError where the
    folder lacks weights, the method needs text (`calibrated.py`), or the cache has no room.
    """
    if quant.format is None or is_quantized(folder):
        return folder
    check_needs_no_text(quant)
    config = QtuneConfig.of(quant)
    identity = f"{VERSION} {identity_of(folder)} {config.to_dict()} {dtype}"
    name = f"{folder.name}-{quant.format}"

    def build(partial_folder: Path) -> None:
        size = sum(path.stat().st_size for path in weight_files(folder))
        need_space(partial_folder, int(MOST_SHARE * size))
        options = {"dtype": dtype, "trust_remote_code": trust_remote_code}
        _write(folder, partial_folder, config, device=device, **options)

    return build_once(model_folder(name, identity), build)


def identity_of(folder: Path) -> str:
    """What tells the folder's content: its settings, and the files behind its weights.

    Not the sum of these: reading gigabytes on every call would cost more than it proves, and the
    hub's own cache names them by their sums.
    """
    files = [path.resolve() for path in weight_files(folder)]
    status = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return f"{read_json(folder / 'config.json')} {status}"


def _write(source: Path, folder: Path, config: QtuneConfig, **options: Any) -> None:
    shards = Shards(folder, SHARD_BYTES)
    register()
    with quantizing_by(_quantizer_into(shards)):
        model = load_complete(source, quantization_config=config, **options)
    for name, tensor in left(model):
        shards.add(name, tensor.cpu())
    shards.finish()
    complete(source, folder, config)


def complete(source: Path, folder: Path, config: QtuneConfig) -> None:
    """Put what a model folder needs beside its weights into `folder`."""
    for pattern in COMPANIONS:
        for path in source.glob(pattern):
            shutil.copyfile(path, folder / path.name)
    stored = read_json(source / "config.json") | {"quantization_config": config.to_dict()}
    text = json.dumps(stored, indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


@contextmanager
def quantizing_by(quantizer: type[QtuneQuantizer]) -> Iterator[None]:
    """Meanwhile transformers quantizes to our formats by this class."""
    usual = AUTO_QUANTIZER_MAPPING["qtune"]
    AUTO_QUANTIZER_MAPPING["qtune"] = quantizer
    try:
        yield
    finally:
        AUTO_QUANTIZER_MAPPING["qtune"] = usual


def _quantizer_into(shards: Shards) -> type[QtuneQuantizer]:
    class ToShards(QtuneQuantizer):
        def get_quantize_ops(self) -> ConversionOps:
            return PackAway(super().get_quantize_ops(), shards)

    return ToShards


class PackAway(ConversionOps):
    """An operation whose results go into shards, and empty ones into the model."""

    def __init__(self, pack: ConversionOps, shards: Shards) -> None:
        self._pack, self._shards = pack, shards

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], **options: Any
    ) -> dict[str, Tensor]:
        """Empty tensors by full name; those with the codes are in the shards now."""
        packed: Any = self._pack.convert(input_dict, **options)
        for name, tensor in packed.items():
            self._shards.add(name, tensor.detach().cpu())
        return {name: on_meta(tensor) for name, tensor in packed.items()}


def on_meta(tensor: Tensor) -> nn.Parameter:
    """An empty parameter of that shape and dtype on `meta`."""
    return nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=False)


def left(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of all that was not quantized, tied ones once."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for name, tensor in model.state_dict().items():
        if not tensor.is_meta and name not in tied:
            yield name, tensor
