"""Training through the codes that are served: y = x Q(W + s B A)^T.

A quantized layer with its update merged and quantized again has other codes, and the model that an
adapter was trained in is not the one that comes of it. Here the forward pass has those codes, as in
L4Q (arXiv 2402.04902), so what is trained, measured and served is one model. Gradients pass the
rounding as if it were not there, and are LoRA's (`qtune_kernels.straight_through`).

Scales and zero points stay those of the base, so only codes change, and only where the optimizer
has stepped: they are made once for a step, and the products are those of any quantized layer. W
lies where the original weights did, or at random between levels (`quant/dither.py`): merged onto
the dequantized weights themselves, nearly every update would be rounded away, as none is half a
step large.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as dense_linear

from qtune.quant.dither import PARTS, original_places, shifted_codes
from qtune.quant.linear import QuantLinear
from qtune_kernels.linear import linear
from qtune_kernels.straight_through import straight_through

# the attribute of PEFT's layer
NAME = "merge_aware"


class MergedCodes(nn.Module):
    """The codes of a layer with its update in them, packed as the layer's own.

    While `serves` is false, the layer is that of plain LoRA. `places` says where in the cells of
    their codes the original weights lie; without `original` there is none, and places are random.
    """

    codes: nn.Parameter
    places: nn.Parameter | None

    def __init__(self, base: QuantLinear, *, original: bool) -> None:
        super().__init__()
        self.serves = False
        self.codes = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
        self.register_parameter("places", None)
        if original:
            size, device = base.in_features * base.out_features, base.weight.device
            middle = torch.full((size,), PARTS // 2, dtype=torch.uint8, device=device)
            self.places = nn.Parameter(middle, requires_grad=False)
        # the codes from which the dense weight was made, and that; within `unpacked` only
        self._unpacked: tuple[int, Tensor] | None = None

    def take(self, base: QuantLinear, weight: Tensor) -> None:
        """Let the places be those of the original weight [O, I]."""
        assert self.places is not None
        self.places.copy_(original_places(base, weight.to(self.places.device)))

    @torch.no_grad()
    def renew(self, base: QuantLinear, a: Tensor, b: Tensor, scaling: float) -> None:
        """Take the codes for the adapter as it is: A [R, I], B [O, R]."""
        self.codes.copy_(shifted_codes(base, base.inner_a(a), b, scaling, self.places))

    def forward(self, base: QuantLinear, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        """y [..., O] in the dtype of x [..., I], with the codes as they were last made."""
        bias = None if base.bias is None else base.bias.to(x.dtype)
        inner, dense = base.inner_input(x), self._dense(base, x.dtype)
        if dense is not None:
            y = dense_linear(inner, dense, bias)
        else:
            shared = *base.quant_weight.scales, base.format.levels, base.group_size
            y = linear(inner, self.codes, *shared, base.out_features, bias)
        return straight_through(y, inner, base.inner_a(a), b, scaling)

    def tuned(self, base: QuantLinear) -> QuantLinear:
        """The layer that is written: that of `base` with these codes."""
        return with_codes(base, self.codes)

    def _dense(self, base: QuantLinear, dtype: torch.dtype) -> Tensor | None:
        """The dense inner weight [O, I], as long as that of the base is kept in this dtype."""
        if base.dense is None or base.dense.dtype != dtype:
            self._unpacked = None
            return None
        made_from = self.codes._version
        if self._unpacked is None or self._unpacked[0] != made_from:
            self._unpacked = made_from, self.tuned(base).dequantize_inner(dtype)
        return self._unpacked[1]


def with_codes(base: QuantLinear, codes: Tensor) -> QuantLinear:
    """A layer like `base`, with which it shares all but its codes, packed."""
    layer = QuantLinear(
        base.in_features,
        base.out_features,
        storage=base.storage,
        compute_dtype=base.compute_dtype,
        device="meta",
    )
    layer.load({name: getattr(base, name) for name in base.tensor_names} | {"weight": codes})
    layer.bias = base.bias
    return layer
