"""From a matrix to the bytes of a GGUF tensor, a slice of rows at a time."""

import torch
from torch import Tensor

from qtune.errors import UserError
from qtune.quant.kquants import kinds
from qtune.quant.kquants.descent import Block, fit
from qtune.quant.kquants.kinds import Kind
from qtune.quant.kquants.layout import packed
from qtune.quant.kquants.moments import Target
from qtune.quant.kquants.worth import of_inputs

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
KINDS = (*FLOATS, *kinds.KINDS)
# for rows that are no whole blocks of 256, as llama.cpp chooses
INSTEAD = {"Q2_K": "IQ4_NL", "Q3_K": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
# weights at a time: on the CPU the temporaries stay in the cache, elsewhere the calls are few
SLICE = 1 << 17
DEVICE_SLICE = 1 << 22
# of 16-bit floats, which steps are
LARGEST = 65504.0


def block_size(kind: str) -> int:
    """Weights of a block, which rows are made up of."""
    return 1 if kind in FLOATS else kinds.KINDS[kind].block_size


def type_size(kind: str) -> int:
    """Bytes of a block."""
    return FLOATS[kind].itemsize if kind in FLOATS else kinds.KINDS[kind].type_size


def row_bytes(kind: str, in_features: int) -> int:
    """Bytes of a row of `in_features` weights."""
    return in_features // block_size(kind) * type_size(kind)


def fitting_kind(kind: str, in_features: int) -> str:
    """`kind`, or what llama.cpp takes where rows of `in_features` are no whole blocks of it.

    That is F16 where blocks of 32 do not fit either.
    """
    for name in (kind, INSTEAD.get(kind, kind)):
        if in_features % block_size(name) == 0:
            return name
    return "F16"


def encode(weight: Tensor, kind: str, importance: Tensor | None = None) -> Tensor:
    """Bytes, uint8 [O, row_bytes], of a weight [O, I] as blocks of `kind`.

    `importance` [I] is what errors at an input count: the mean of its squares. Raises UserError
    where rows are no whole blocks, ValueError for weights that are no 16-bit numbers.
    """
    _check(weight, kind)
    if kind in FLOATS:
        return weight.to(FLOATS[kind]).contiguous().view(torch.uint8)
    worths = weight.new_ones(weight.shape[1]) if importance is None else of_inputs(importance)
    worths = worths.to(weight.device, torch.float32)
    encoded = weight.new_empty(len(weight), row_bytes(kind, weight.shape[1]), dtype=torch.uint8)
    rows = max(1, (SLICE if weight.is_cpu else DEVICE_SLICE) // weight.shape[1])
    for at in range(0, len(weight), rows):
        fitted = _fitted(weight[at : at + rows].float(), kinds.KINDS[kind], worths)
        encoded[at : at + rows] = packed(fitted, kind).view(-1, encoded.shape[1])
    return encoded


def _fitted(weight: Tensor, kind: Kind, worths: Tensor) -> Block:
    """The blocks of a float32 weight [O, I], row after row; `worths` [I] are those of inputs."""
    return fit(Target.of(_columns(weight, kind), _columns(worths.expand_as(weight), kind)), kind)


def _columns(matrix: Tensor, kind: Kind) -> Tensor:
    """Blocks along the last dimension, [S, G, N], of a matrix [O, I]."""
    return matrix.reshape(-1, kind.block_size).T.contiguous().view(kind.groups, kind.size, -1)


def _check(weight: Tensor, kind: str) -> None:
    if weight.shape[1] % block_size(kind):
        raise UserError(
            f"rows of {weight.shape[1]} weights are no whole blocks of {block_size(kind)}, which "
            f"{kind} takes; {fitting_kind(kind, weight.shape[1])} can hold them"
        )
    if not weight.numel() or not weight.abs().amax() <= LARGEST:
        raise ValueError("the weight is empty, or holds infinities, NaN or more than 65504")
