"""QuantLinear: a frozen linear layer that holds codes and hands them to the kernels.

Every quantized tensor is a frozen uint8 Parameter, float32 scales as their bytes. So nothing casts
them (`.to(dtype)`, `.half()`, mixed-precision wrappers), and saving, loading, DDP and FSDP2 treat
them as the plain tensors they are. There are no buffers and no tensor subclasses.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear as dense_linear

from qtune.quant.format import load_format
from qtune.quant.weight import (
    QuantWeight,
    check_group_size,
    dequantize,
    quantize,
    storage_bytes,
)
from qtune_kernels.linear import linear
from qtune_kernels.scales import Scales

TENSORS = ("weight", "scale_codes", "scale_scales", "scale_offset")


class QuantLinear(nn.Linear):
    """y = x W^T + b with W [O, I] in a number format; same inputs and outputs as `nn.Linear`.

    `weight`, `scale_codes`, `scale_scales` and `scale_offset` are uint8 Parameters without
    gradient; `compute_dtype` is what `dequantize` and PEFT use where no input dtype decides.
    Raises UserError for an unknown format and for a group size that is no power of two.
    """

    scale_codes: nn.Parameter
    scale_scales: nn.Parameter
    scale_offset: nn.Parameter
    bias: nn.Parameter | None  # type: ignore[assignment]
    # the dense weight, within `unpacked` only
    dense: Tensor | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        format_name: str = "nf4",
        group_size: int = 64,
        compute_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        check_group_size(group_size)
        self.in_features, self.out_features = in_features, out_features
        self.format_name, self.group_size = format_name, group_size
        self.compute_dtype = compute_dtype
        self.format = load_format(format_name)
        sizes = storage_bytes(in_features * out_features, self.format, group_size)
        for name, size in sizes.items():
            tensor = torch.empty(size, dtype=torch.uint8, device=device)
            self.register_parameter(name, _frozen(tensor))
        self.register_parameter("bias", None)
        if bias:
            self.bias = _frozen(torch.empty(out_features, dtype=compute_dtype, device=device))

    @classmethod
    def from_linear(cls, dense: nn.Linear, format_name: str, group_size: int) -> "QuantLinear":
        """The quantized form of a dense layer, on its device, computing in its dtype."""
        new = cls(
            dense.in_features,
            dense.out_features,
            dense.bias is not None,
            format_name=format_name,
            group_size=group_size,
            compute_dtype=dense.weight.dtype,
            device="meta",
        )
        new.quantize(dense.weight)
        if dense.bias is not None:
            new.bias = _frozen(dense.bias.detach())
        return new

    def quantize(self, weight: Tensor) -> None:
        """Take the codes of a dense weight [O, I] in place of the present ones."""
        for name, tensor in self.pack(weight).items():
            setattr(self, name, _frozen(tensor))

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """The uint8 tensors this layer would store for a dense weight [O, I], by parameter name."""
        made = quantize(weight, self.format, self.group_size)
        tensors = (made.packed, *made.scales)
        return {
            name: tensor.view(torch.uint8) for name, tensor in zip(TENSORS, tensors, strict=True)
        }

    @property
    def quant_weight(self) -> QuantWeight:
        """The stored tensors in their own dtypes."""
        scales = self.scale_scales.view(torch.float32), self.scale_offset.view(torch.float32)
        return QuantWeight(self.weight, Scales(self.scale_codes, *scales))

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weights [O, I] that the codes stand for; a fresh tensor each time."""
        shape = (self.out_features, self.in_features)
        dtype = dtype or self.compute_dtype
        return dequantize(self.quant_weight, self.format, self.group_size, shape, dtype)

    @property
    def W_q(self) -> Tensor:
        """The packed weight under the name by which PEFT knows that `dequantize` must be called."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        """y [..., O] in the dtype of x [..., I]."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.dense is not None and self.dense.dtype == x.dtype:
            return dense_linear(x, self.dense, bias)
        packed, scales = self.quant_weight
        y: Tensor = linear(
            x, packed, *scales, self.format.levels, self.group_size, self.out_features, bias
        )
        return y

    def reset_parameters(self) -> None:
        """Nothing: codes come from a checkpoint, there is no random start."""

    def extra_repr(self) -> str:
        """What printing the module shows."""
        return f"{super().extra_repr()}, format={self.format_name}, group_size={self.group_size}"


@contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """Meanwhile quantized layers on the CPU keep their weights dense, if memory has room to spare.

    For decoding, where every token would unpack all weights again for a product with few rows.
    The same weights are multiplied by the same routine, so results are the same bits. Layers that
    are spread over processes stay packed: they are whole only while they run.
    """
    layers = [m for m in model.modules() if isinstance(m, QuantLinear) and _is_here(m.weight)]
    size = sum(m.in_features * m.out_features * m.compute_dtype.itemsize for m in layers)
    if 2 * size > psutil.virtual_memory().available:
        layers = []
    try:
        for layer in layers:
            layer.dense = layer.dequantize()
        yield
    finally:
        for layer in layers:
            layer.dense = None


def _is_here(codes: Tensor) -> bool:
    return codes.is_cpu and not isinstance(codes, DTensor)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
