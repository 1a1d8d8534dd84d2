"""A model as calibration needs it: all there but the blocks' matrices, which stay in their files.

transformers reads, merges and converts the tensors as for any model. What it would hand to the
quantizer is kept aside: matrices of linear layers as views of the mapped files, which take no
memory before they are looked at; those that came out of a cast or a merge are put into files first.
Experts are quantized at once, to the nearest level, into files too: a calibration text seldom shows
each expert enough tokens.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.quantizers_utils import get_module_from_name

from qtune.model.checkpoint import stored_names, stored_tensor
from qtune.model.load import load_complete, register
from qtune.model.prequantized import SHARD_BYTES, PackAway, on_meta, quantizing_by
from qtune.model.quant_config import QtuneConfig
from qtune.model.quantizer import QtuneQuantizer
from qtune.model.shards import Shards
from qtune.quant.linear import QuantLinear


@dataclass(frozen=True)
class Dense:
    """A model whose quantized layers are empty, and what belongs there.

    `weights` are the dense matrices [O, I] by the layers' names, mapped; `experts` the files of
    packed tensors of experts, by the tensors' names.
    """

    model: PreTrainedModel
    weights: dict[str, Tensor]
    experts: dict[str, Path]

    @property
    def device(self) -> torch.device:
        """Where the model is, and computes."""
        found: torch.device = self.model.get_input_embeddings().get_parameter("weight").device
        return found

    @contextmanager
    def experts_of(self, block: str) -> Iterator[None]:
        """Meanwhile the experts below the block of that name have their codes."""
        places = [name for name in self.experts if name.startswith(f"{block}.")]
        for name in places:
            self._put(name, stored_tensor(self.experts[name], name).to(self.device))
        try:
            yield
        finally:
            for name in places:
                layer, leaf = get_module_from_name(self.model, name)
                setattr(layer, leaf, on_meta(getattr(layer, leaf)))

    def _put(self, name: str, tensor: Tensor) -> None:
        layer, leaf = get_module_from_name(self.model, name)
        setattr(layer, leaf, nn.Parameter(tensor, requires_grad=False))


def load_dense(
    source: Path,
    config: QtuneConfig,
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
) -> Dense:
    """The model of the folder `source`, with what needs files of its own in `folder`.

    What is not quantized is on `device`; all is in `dtype`. Raises UserError as `load_complete`
    does.
    """
    register()
    shutil.rmtree(folder, ignore_errors=True)
    matrices, experts = (_shards(folder / name) for name in ("matrices", "experts"))
    weights: dict[str, Tensor] = {}
    with quantizing_by(_keeping(weights, matrices, experts)):
        model = load_complete(
            source,
            device=torch.device("cpu"),
            dtype=dtype,
            quantization_config=config,
            trust_remote_code=trust_remote_code,
        )
    for shards in (matrices, experts):
        shards.finish()
    for name, path in stored_names(matrices.folder).items():
        weights[name] = stored_tensor(path, name)
    model.requires_grad_(False).eval()
    model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))
    return Dense(model, weights, stored_names(experts.folder))


def _shards(folder: Path) -> Shards:
    folder.mkdir(parents=True)
    return Shards(folder, SHARD_BYTES)


def _keeping(weights: dict[str, Tensor], matrices: Shards, experts: Shards) -> type[QtuneQuantizer]:
    class Keeping(QtuneQuantizer):
        def get_quantize_ops(self) -> ConversionOps:
            return _Keep(PackAway(super().get_quantize_ops(), experts), weights, matrices)

    return Keeping


class _Keep(ConversionOps):
    """An operation that keeps matrices of linear layers as they come, and packs away experts."""

    def __init__(
        self, pack_away: ConversionOps, weights: dict[str, Tensor], matrices: Shards
    ) -> None:
        self._pack_away, self._weights, self._matrices = pack_away, weights, matrices

    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        *,
        full_layer_name: str,
        model: nn.Module,
        **options: Any,
    ) -> dict[str, Tensor]:
        """Empty tensors by full name."""
        layer, _ = get_module_from_name(model, full_layer_name)
        names: Any = {"full_layer_name": full_layer_name, "model": model}
        if not isinstance(layer, QuantLinear):
            made: Any = self._pack_away.convert(input_dict, **names, **options)
            return dict(made)
        (value,) = input_dict.values()
        dense: Tensor = value[0] if isinstance(value, list) else value
        name = full_layer_name.removesuffix(".weight")
        if dense.untyped_storage().resizable():
            # memory of its own, and no view of a mapped file
            self._matrices.add(name, dense)
        else:
            self._weights[name] = dense
        return {f"{name}.{leaf}": on_meta(getattr(layer, leaf)) for leaf in layer.tensor_names}
