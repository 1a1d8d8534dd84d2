"""QuantLinear: a frozen linear layer that holds codes and hands them to the kernels.

Every quantized tensor is a frozen uint8 Parameter, float32 scales as their bytes. So nothing casts
them (`.to(dtype)`, `.half()`, mixed-precision wrappers), and saving, loading, DDP and FSDP2 treat
them as the plain tensors they are. There are no buffers and no tensor subclasses.

A layer may work on other inputs than those it is given: x times a factor for each channel, then
rotated. Its codes are then those of the weight that does the same to them. Whatever chooses codes
sees inner weights and inner inputs; everyone else sees the layer as that of plain ones.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import psutil
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear as dense_linear

from qtune.quant.format import Params
from qtune.quant.storage import Storage
from qtune.quant.weight import (
    QuantWeight,
    Settled,
    dequantize,
    from_bytes,
    quantize,
    settle,
    storage_bytes,
    stored_dtypes,
    to_bytes,
)
from qtune_kernels.hadamard import hadamard
from qtune_kernels.linear import linear
from qtune_kernels.linear_int8 import linear_int8
from qtune_kernels.packing import pack

NF4 = Storage()


class QuantLinear(nn.Linear):
    """y = x W^T + b with W [O, I] as `storage` says; same inputs and outputs as `nn.Linear`.

    The tensors named in `tensor_names` are uint8 Parameters without gradient; `compute_dtype` is
    what `dequantize` and PEFT use where no input dtype decides.
    """

    scale_codes: nn.Parameter
    channels: nn.Parameter
    bias: nn.Parameter | None  # type: ignore[assignment]
    # the dense inner weight, within `unpacked` only
    dense: Tensor | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        storage: Storage = NF4,
        compute_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.storage, self.format = storage, storage.number_format
        self.group_size = storage.weights_of_group(self.shape)
        self.compute_dtype = compute_dtype
        # looked up once, and not with each product
        self._dtypes = stored_dtypes(storage)
        sizes = storage_bytes(self.shape, storage)
        self.tensor_names = tuple(sizes)
        for name, size in sizes.items():
            tensor = torch.empty(size, dtype=torch.uint8, device=device)
            self.register_parameter(name, _frozen(tensor))
        self.register_parameter("bias", None)
        if bias:
            self.bias = _frozen(torch.empty(out_features, dtype=compute_dtype, device=device))

    @classmethod
    def from_linear(cls, dense: nn.Linear, storage: Storage = NF4) -> "QuantLinear":
        """The quantized form of a dense layer, on its device, computing in its dtype."""
        new = cls(
            dense.in_features,
            dense.out_features,
            dense.bias is not None,
            storage=storage,
            compute_dtype=dense.weight.dtype,
            device="meta",
        )
        new.load(new.pack(dense.weight))
        if dense.bias is not None:
            new.bias = _frozen(dense.bias.detach())
        return new

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.out_features, self.in_features

    def pack(self, weight: Tensor, channels: Tensor | None = None) -> dict[str, Tensor]:
        """The uint8 tensors this layer would store for a dense weight [O, I], by parameter name.

        Each weight takes the nearest level. `channels` [I] are the factors of inputs, where the
        storage has them; without, they are ones.
        """
        channels = self._ones_if_none(channels, weight.device)
        inner = self.inner_weight(weight.detach(), channels)
        made = quantize(inner, self.storage, self.group_size)
        return to_bytes(made, self.storage) | _channel_bytes(channels)

    def settle(self, params: Params) -> Settled:
        """Parameters of all groups, [O I / G] in flat order, as they are stored and decode."""
        return settle(params, self.storage)

    def store(
        self, codes: Tensor, settled: Settled, channels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The uint8 tensors of inner codes, uint8 [O, I], and parameters; see `pack`."""
        channels = self._ones_if_none(channels, codes.device)
        made = QuantWeight(pack(codes, self.format.bits), settled.tensors)
        return to_bytes(made, self.storage) | _channel_bytes(channels)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the tensors that `pack` or `store` made in place of the present ones."""
        for name in self.tensor_names:
            setattr(self, name, _frozen(tensors[name]))

    def quantize(self, weight: Tensor) -> None:
        """Take the nearest codes to a dense weight [O, I], with the channel factors kept."""
        self.load(self.pack(weight, self.channel_factors))

    @property
    def quant_weight(self) -> QuantWeight:
        """The stored tensors in their own dtypes."""
        named = {name: getattr(self, name) for name in self._dtypes}
        return from_bytes(named, self._dtypes)

    @property
    def channel_factors(self) -> Tensor | None:
        """What inputs are multiplied by, float16 [I], where the storage has such factors."""
        return self.channels.view(torch.float16) if self.storage.channels else None

    def inner_input(self, x: Tensor) -> Tensor:
        """What the inner weight is multiplied by: x [..., I] times channels and rotated."""
        if self.storage.channels:
            # in float32 where x is bfloat16: rounded factors would not be those of the weight
            x = (x * self.channels.view(torch.float16)).to(x.dtype)
        return self._rotated(x)

    def inner_weight(self, weight: Tensor, channels: Tensor | None = None) -> Tensor:
        """The weight [O, I] for inner inputs; float32 where it is another.

        `channels` are those stored, if not given.
        """
        if not (self.storage.channels or self.storage.rotated):
            return weight
        return self._rotated(self._divided(weight.float(), channels))

    def inner_a(self, a: Tensor) -> Tensor:
        """The matrix [R, I], in its dtype, whose product with inner inputs is that of a with x."""
        return self._rotated(self._divided(a, None).to(a.dtype))

    def inner_hessian(self, hessian: Tensor, channels: Tensor | None = None) -> Tensor:
        """The mean of x^T x over inner inputs, float32 [I, I], given that over plain ones."""
        if self.storage.channels:
            factors = self._factors(channels)
            hessian = hessian * factors * factors.unsqueeze(1)
        return self._rotated(self._rotated(hessian).mT).mT if self.storage.rotated else hessian

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weights [O, I] that the codes stand for; a fresh tensor each time."""
        dtype = dtype or self.compute_dtype
        if not (self.storage.channels or self.storage.rotated):
            return self.dequantize_inner(dtype)
        weight = self.dequantize_inner(torch.float32)
        if self.storage.rotated:
            weight = hadamard(weight, True)
        return (weight * self._factors(None) if self.storage.channels else weight).to(dtype)

    def dequantize_inner(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weights [O, I] for inner inputs; a fresh tensor each time."""
        dtype = dtype or self.compute_dtype
        return dequantize(self.quant_weight, self.format, self.group_size, self.shape, dtype)

    @property
    def W_q(self) -> Tensor:
        """The packed weight under the name by which PEFT knows that `dequantize` must be called."""
        return self.weight

    @property
    def fuses_adapter(self) -> bool:
        """Whether the product with codes may be taken together with that of an adapter."""
        return self.storage.activations is None

    def forward(self, x: Tensor) -> Tensor:
        """y [..., O] in the dtype of x [..., I]."""
        x = self.inner_input(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.dense is not None and self.dense.dtype == x.dtype:
            return dense_linear(x, self.dense, bias)
        return self._product(x, bias)

    def reset_parameters(self) -> None:
        """Nothing: codes come from a checkpoint, there is no random start."""

    def extra_repr(self) -> str:
        """What printing the module shows."""
        return f"{super().extra_repr()}, {self.storage}"

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """y [..., O] of inner inputs [..., I]."""
        packed, scales = self.quant_weight
        y: Tensor
        if self.storage.activations == "int8":
            shape = self.group_size, self.out_features
            y = linear_int8(x, packed, *scales, *shape, bias, self.storage.outliers)
        else:
            weight = packed, *scales, self.format.levels, self.group_size, self.out_features
            y = linear(x, *weight, bias)
        return y

    def _rotated(self, rows: Tensor) -> Tensor:
        return hadamard(rows) if self.storage.rotated else rows

    def _divided(self, weight: Tensor, channels: Tensor | None) -> Tensor:
        return weight / self._factors(channels) if self.storage.channels else weight

    def _factors(self, channels: Tensor | None) -> Tensor:
        """Channel factors, float32 [I], rounded as they are stored: those given, or the layer's."""
        halves = self.channel_factors if channels is None else channels.half()
        assert halves is not None
        return halves.float()

    def _ones_if_none(self, channels: Tensor | None, device: torch.device) -> Tensor | None:
        """The channel factors to be stored, where the storage has such."""
        assert channels is None or self.storage.channels
        missing = self.storage.channels and channels is None
        return torch.ones(self.in_features, device=device) if missing else channels


@contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """Meanwhile quantized layers on the CPU keep their weights dense, if memory has room to spare.

    For decoding, where every token would unpack all weights again for a product with few rows.
    The same weights are multiplied by the same routine, so results are the same bits. Layers that
    are spread over processes stay packed: they are whole only while they run.
    """
    layers = [m for m in model.modules() if isinstance(m, QuantLinear) and _unpacks(m)]
    size = sum(m.in_features * m.out_features * m.compute_dtype.itemsize for m in layers)
    if 2 * size > psutil.virtual_memory().available:
        layers = []
    try:
        for layer in layers:
            layer.dense = layer.dequantize_inner()
        yield
    finally:
        for layer in layers:
            layer.dense = None


def _unpacks(layer: QuantLinear) -> bool:
    here = layer.weight.is_cpu and not isinstance(layer.weight, DTensor)
    return here and layer.storage.activations is None


def _channel_bytes(channels: Tensor | None) -> dict[str, Tensor]:
    return {} if channels is None else {"channels": channels.half().view(torch.uint8)}


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
