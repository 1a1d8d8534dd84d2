"""Training the scales, and zero points, of a quantized layer whose codes stay as they are.

PEQA (arXiv 2305.14152) and the second phase of EfficientQAT (arXiv 2407.11062). The result is a
low-bit checkpoint by itself: there is nothing to merge, and nothing is lost.

Parameters are float32 and what the product sees is their float16 rounding, which is also what is
written (`qtune_kernels.scaled_linear`). They are held in units in which one learning rate means the
same for every format: scales times the largest level, which is about the largest weight of the
group, and zero points times the scale, which is how far they shift the group's weights. A step of
an optimizer of size lr changes a weight by about lr, be its scale that of NF4 (the largest weight)
or that of INT8 (a 127th of it).

The module sits in PEFT's layer beside the LoRA matrices, so PEFT's switches work, and for training
loop and checkpoints it is parameters like any other. In a run's adapter folder LoRA matrices are as
PEFT writes them, and scales have a file of their own (`scales_file.py`).
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as dense_linear

from qtune.quant.format import Params
from qtune.quant.linear import QuantLinear
from qtune.quant.weight import SCALE_DTYPES, ZERO_DTYPES, QuantWeight, to_bytes
from qtune_kernels.scaled_linear import scaled_linear, stored_scales
from qtune_kernels.scales import Scales, dequantize_scales, unpack_zeros

# the attribute of PEFT's layer, by which parameters are known from their names
NAME = "trained_scales"
# the largest level of 8-bit codes, which have no table
LARGEST_INTEGER = 127.0


class TrainedScales(nn.Module):
    """Trained scales of a QuantLinear: `scales` and, where zero points are trained, `shifts`.

    Both are float32 [S], in the units described above; `shifts` is None otherwise.
    """

    scales: nn.Parameter
    shifts: nn.Parameter | None

    def __init__(self, base: QuantLinear, *, zeros: bool) -> None:
        super().__init__()
        self.unit, self.shape = largest_level(base), base.shape
        found = decoded(base)
        self.scales = nn.Parameter(found.scales * self.unit)
        self.register_parameter("shifts", None)
        if zeros and found.zeros is not None:
            self.shifts = nn.Parameter(found.zeros * found.scales)
        # the base's dense weight, and what it is with these scales; within `unpacked` only
        self._unpacked: tuple[Tensor, Tensor] | None = None

    def forward(self, base: QuantLinear, x: Tensor) -> Tensor:
        """y [..., O] in the dtype of x [..., I], with the codes of `base`."""
        bias = None if base.bias is None else base.bias.to(x.dtype)
        inner, dense = base.inner_input(x), self._dense(base, x.dtype)
        if dense is not None:
            return dense_linear(inner, dense, bias)
        trained = base.weight, self.scales / self.unit, self.shifts, self._frozen_zeros(base)
        sizes = base.format.levels, base.group_size, base.out_features
        y: Tensor = scaled_linear(inner, *trained, *sizes, bias)
        return y

    @torch.no_grad()
    def tuned(self, base: QuantLinear) -> QuantLinear:
        """The layer that is written: the codes of `base` with these scales in float16."""
        return with_scales(base, self.stored(self.scales, self.shifts, self._frozen_zeros(base)))

    def stored(self, scales: Tensor, shifts: Tensor | None, zeros: Tensor | None) -> Scales:
        """Values of the two parameters as they are stored, with frozen `zeros` if there are any."""
        return stored_scales(scales / self.unit, shifts, zeros)

    def _frozen_zeros(self, base: QuantLinear) -> Tensor | None:
        return base.quant_weight.scales.zeros if self.shifts is None else None

    def _dense(self, base: QuantLinear, dtype: torch.dtype) -> Tensor | None:
        """The dense inner weight [O, I], as long as that of the base is kept in this dtype."""
        if base.dense is None or base.dense.dtype != dtype:
            self._unpacked = None
            return None
        if self._unpacked is None or self._unpacked[0] is not base.dense:
            self._unpacked = base.dense, self.tuned(base).dequantize_inner(dtype)
        return self._unpacked[1]


def with_scales(base: QuantLinear, scales: Scales) -> QuantLinear:
    """A layer with the codes of `base`, which both share, and these scales and zero points."""
    kinds = {dtype: kind for kind, dtype in SCALE_DTYPES.items()}
    storage = replace(base.storage, scales=kinds[scales.codes.dtype])
    if scales.zeros is not None and scales.zeros.is_floating_point():
        names = {dtype: kind for kind, dtype in ZERO_DTYPES.items()}
        storage = replace(storage, zeros=names[scales.zeros.dtype])
    layer = QuantLinear(
        base.in_features,
        base.out_features,
        storage=storage,
        compute_dtype=base.compute_dtype,
        device="meta",
    )
    kept = {"channels": base.channels} if base.storage.channels else {}
    layer.load(to_bytes(QuantWeight(base.weight, scales), storage) | kept)
    layer.weight, layer.bias = base.weight, base.bias
    return layer


def decoded(layer: QuantLinear) -> Params:
    """Scales and zero points of a layer's groups, float32 [S]; None where it has no such points."""
    scales = layer.quant_weight.scales
    found = dequantize_scales(scales)
    if scales.zeros is None:
        return Params(found)
    return Params(found, unpack_zeros(scales.zeros, layer.format.bits, found.numel()))


def largest_level(layer: QuantLinear) -> float:
    """How far the levels of a layer's format reach to either side, its zero points apart."""
    levels = layer.format.levels
    return (max(levels) - min(levels)) / 2 if levels else LARGEST_INTEGER
