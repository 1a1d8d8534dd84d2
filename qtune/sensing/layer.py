"""One linear layer in one format: its codes, what its output loses, how far predictions move."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qtune.model.calibration.fit import Wanted, fit
from qtune.model.quant_config import QtuneConfig
from qtune.quant.linear import QuantLinear
from qtune.quant.vector_linear import layer_type
from qtune.recipe import Quant
from qtune.sensing.divergence import divergence
from qtune.sensing.gradients import Seen
from qtune.sensing.sensitivity import Sensitivity


@dataclass(frozen=True)
class Layer:
    """A dense layer, and what was seen of it on the text."""

    name: str
    dense: nn.Linear
    hessian: Tensor
    """Mean of x^T x over the text, float32 [I, I]."""
    seen: Sequence[Seen]
    num_targets: Sequence[int]
    """Of each row of the text."""

    def measure(self, quant: Quant) -> Sensitivity:
        """What the layer loses in the format of `quant`, with its codes found as that says."""
        assert quant.format is not None
        weight, layer = self.dense.weight, self._empty(quant)
        wanted = Wanted(quant, None, {})
        error = fit(self.name, layer, weight, self.hessian, wanted).figures.error
        assert error is not None
        change = layer.dequantize(torch.float32) - weight.float()
        moved = divergence(self.seen, self.num_targets, change)
        return Sensitivity(
            layer=self.name,
            format=quant.format,
            num_weights=weight.numel(),
            size_bytes=sum(parameter.nbytes for parameter in layer.parameters()),
            output_error=error,
            divergence=moved.nats,
            standard_error=moved.standard_error,
        )

    def _empty(self, quant: Quant) -> QuantLinear:
        """A layer of that form and of the dense layer's sizes, without bias and codes."""
        storage = QtuneConfig.of(quant).storage(self.name)
        return layer_type(storage)(
            self.dense.in_features,
            self.dense.out_features,
            storage=storage,
            compute_dtype=self.dense.weight.dtype,
            device=self.dense.weight.device,
        )
