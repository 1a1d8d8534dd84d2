"""VectorLinear: the QuantLinear of a code book for vectors of weights (E8P).

Words of 16 bits stand for eight neighbours of a row, and the whole matrix has one scale. That suits
weights that are all alike, so outputs are rotated too: with R for inputs and another one, S, for
outputs, the inner weight is S^T W R, and y = (x R) (S^T W R)^T S^T. Nothing but the words and the
scale is stored. The product with an adapter is not fused, since it belongs to outputs before they
are rotated back.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear
from torch.nn.functional import pad

from qtune.errors import UserError
from qtune.quant.linear import QuantLinear
from qtune.quant.storage import Storage
from qtune.quant.weight import Settled, storage_bytes
from qtune_kernels.e8p import e8p_dequantize, e8p_linear
from qtune_kernels.e8p_book import LENGTH, nearest_words
from qtune_kernels.hadamard import hadamard

FORMATS = ("e8p",)
# other signs than those of inputs: a matrix of equal sides would keep a strong diagonal
_OUTPUTS = 1


def layer_type(storage: Storage) -> type[QuantLinear]:
    """The class of layers that are stored so."""
    return VectorLinear if storage.format in FORMATS else QuantLinear


class VectorLinear(QuantLinear):
    """y = x W^T + b with W [O, I] as words of the code book E8P.

    Raises UserError where rows are no whole vectors. Of the storage only the format counts: there
    is one scale, and both sides are always rotated.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        storage: Storage,
        compute_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        if in_features % LENGTH:
            raise UserError(
                f"format {storage.format} takes {LENGTH} weights of a row together, and a row of "
                f"{in_features} is not a multiple; give that layer another format, such as int2, "
                "in quant.layers"
            )
        own = Storage(format=storage.format, group_size="tensor", rotated=True)
        super().__init__(
            in_features,
            out_features,
            bias,
            storage=own,
            compute_dtype=compute_dtype,
            device=device,
        )

    def pack(self, weight: Tensor, channels: Tensor | None = None) -> dict[str, Tensor]:
        """The uint8 tensors of the nearest points to a dense weight [O, I]; it has no channels."""
        inner = self.inner_weight(weight.detach())
        settled = self.settle(self.format.fit(inner.reshape(1, -1)))
        vectors = (inner / settled.params.scales).reshape(-1, LENGTH)
        return self.store(nearest_words(vectors), settled)

    def store(
        self, codes: Tensor, settled: Settled, channels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The uint8 tensors of words, int32 [O I / 8] in any shape, and the one scale."""
        packed = codes.reshape(-1).to(torch.int16).view(torch.uint8)
        room = storage_bytes(self.shape, self.storage)["weight"] - len(packed)
        scale = settled.tensors.codes.view(torch.uint8)
        return {"weight": pad(packed, (0, room)), "scale_codes": scale}

    def inner_weight(self, weight: Tensor, channels: Tensor | None = None) -> Tensor:
        """The weight [O, I], float32, for inner inputs and outputs."""
        inner: Tensor = hadamard(hadamard(weight.float()).T, seed=_OUTPUTS).T
        return inner

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weights [O, I] that the words stand for; a fresh tensor each time."""
        inner = self.dequantize_inner(torch.float32)
        weight: Tensor = hadamard(hadamard(inner, True).T, True, _OUTPUTS).T
        return weight.to(dtype or self.compute_dtype).contiguous()

    def dequantize_inner(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weights [O, I] for inner inputs and outputs; a fresh tensor each time."""
        weight: Tensor = e8p_dequantize(*self._stored, *self.shape, dtype or self.compute_dtype)
        return weight

    @property
    def fuses_adapter(self) -> bool:
        """No: an adapter's outputs are not rotated."""
        return False

    def forward(self, x: Tensor) -> Tensor:
        """y [..., O] in the dtype of x [..., I]."""
        x = self.inner_input(x)
        if self.dense is not None and self.dense.dtype == x.dtype:
            inner = dense_linear(x, self.dense)
        else:
            inner = e8p_linear(x, *self._stored, self.out_features)
        y: Tensor = hadamard(inner, transposed=True, seed=_OUTPUTS)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @property
    def _stored(self) -> tuple[Tensor, Tensor]:
        """Words without what fills them up, uint8 [O I / 4], and their scale, float32 [1]."""
        num_bytes = self.in_features * self.out_features * 2 // LENGTH
        return self.weight[:num_bytes], self.scale_codes.view(torch.float32)
