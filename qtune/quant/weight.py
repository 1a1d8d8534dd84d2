"""A quantized matrix: packed codes, scales and zeros as they are stored, and how it is made.

Groups run over the flat matrix, as in bitsandbytes: they end inside rows only where the row length
is no multiple of the group size. The matrix is worked through in slices, so that quantizing needs
little more memory than the result.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from qtune.quant import clip
from qtune.quant.format import Format, Params, ScaleKind, ZeroKind
from qtune.quant.storage import Storage
from qtune_kernels.dequantize import dequantize as dequantize_op
from qtune_kernels.packing import packed_bytes
from qtune_kernels.quantize import encode, num_groups
from qtune_kernels.scales import (
    SCALE_GROUP,
    ZERO_BITS,
    Scales,
    dequantize_scales,
    linear_scales,
    pack_zeros,
    quantize_scales,
    unpack_zeros,
)

# weights whose parameters are fitted at a time: a few MiB in float32, which stays in the cache
SLICE = 1 << 19
SCALE_DTYPES: dict[ScaleKind, torch.dtype] = {
    "dynamic": torch.uint8,
    "linear": torch.int8,
    "half": torch.float16,
    "float": torch.float32,
}
ZERO_DTYPES: dict[ZeroKind, torch.dtype] = {
    "codes": torch.uint8,
    "half": torch.float16,
    "float": torch.float32,
}


class QuantWeight(NamedTuple):
    """A quantized matrix [O, I]: `packed` uint8 (see qtune_kernels.packing), scales and zeros."""

    packed: Tensor
    scales: Scales


class Settled(NamedTuple):
    """The parameters of all groups, as stored and as that decodes."""

    tensors: Scales
    params: Params


def quantize(weight: Tensor, storage: Storage, group_size: int) -> QuantWeight:
    """The quantized form of a weight of any shape and float dtype, nearest level by level."""
    fmt, flat = storage.number_format, weight.detach().reshape(-1)
    fitted = fit(flat, fmt, group_size)
    settled = settle(fitted, storage)
    scales, zeros = settled.params if fmt.encodes_stored_scales else fitted
    return QuantWeight(encode(flat, scales, zeros, fmt.levels, group_size), settled.tensors)


def fit(flat: Tensor, fmt: Format, group_size: int) -> Params:
    """The parameters, float32 [S], of all groups of a flat weight."""
    parts = [clip.fitted(fmt, groups.float()) for groups in _groups(flat, group_size)]
    scales = torch.cat([part.scales for part in parts])
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return Params(scales, torch.cat(zeros) if zeros else None)


def settle(params: Params, storage: Storage) -> Settled:
    """The parameters, of any shape, as `storage` keeps them in flat order; and decoded again."""
    fmt, shape = storage.number_format, params.scales.shape
    scales = _store_scales(params.scales.reshape(-1), storage.scale_kind)
    decoded = dequantize_scales(scales).view(shape)
    if storage.zero_kind is None:
        return Settled(scales, Params(decoded))
    zeros = params.zeros if params.zeros is not None else torch.zeros_like(params.scales)
    if storage.zero_kind == "codes":
        stored = pack_zeros(zeros.reshape(-1), fmt.bits)
    else:
        stored = zeros.reshape(-1).to(ZERO_DTYPES[storage.zero_kind])
    exact = unpack_zeros(stored, fmt.bits, zeros.numel()).view(shape)
    return Settled(scales._replace(zeros=stored), Params(decoded, exact))


def dequantize(
    weight: QuantWeight, fmt: Format, group_size: int, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """The weights [O, I] that the codes stand for, in `dtype`."""
    made: Tensor = dequantize_op(
        weight.packed, *weight.scales, fmt.levels, group_size, *shape, dtype
    )
    return made


def to_bytes(weight: QuantWeight, storage: Storage) -> dict[str, Tensor]:
    """The tensors of a quantized matrix as uint8, by the names under which layers keep them."""
    codes, scales, offset, zeros = weight.scales
    parts = {
        "weight": weight.packed,
        "scale_codes": codes,
        "scale_scales": scales,
        "scale_offset": offset,
    }
    if zeros is not None:
        parts["zeros"] = zeros
    return {name: parts[name].view(torch.uint8) for name in stored_dtypes(storage)}


def from_bytes(tensors: dict[str, Tensor], dtypes: dict[str, torch.dtype]) -> QuantWeight:
    """Views of uint8 tensors in their own dtypes, `stored_dtypes`; undoes the above."""
    views = {name: tensors[name].view(dtype) for name, dtype in dtypes.items()}
    none = views["weight"].new_empty(0, dtype=torch.float32)
    scales = Scales(
        views["scale_codes"],
        views.get("scale_scales", none),
        views.get("scale_offset", none),
        views.get("zeros"),
    )
    return QuantWeight(views["weight"], scales)


def stored_dtypes(storage: Storage) -> dict[str, torch.dtype]:
    """The dtypes of the tensors of a quantized matrix, by the names of `to_bytes`."""
    dtypes = {"weight": torch.uint8, "scale_codes": SCALE_DTYPES[storage.scale_kind]}
    if storage.scale_kind in ("dynamic", "linear"):
        dtypes |= {"scale_scales": torch.float32, "scale_offset": torch.float32}
    if storage.zero_kind is not None:
        dtypes["zeros"] = ZERO_DTYPES[storage.zero_kind]
    return dtypes


def storage_bytes(shape: tuple[int, int], storage: Storage) -> dict[str, int]:
    """Bytes of each stored tensor of a matrix [O, I], by name, without making it."""
    fmt, num_weights = storage.number_format, shape[0] * shape[1]
    num_scales = num_groups(num_weights, storage.weights_of_group(shape))
    numbers = {
        "scale_codes": num_scales,
        "scale_scales": num_groups(num_scales, SCALE_GROUP),
        "scale_offset": 1,
        "zeros": num_scales,
    }
    dtypes = stored_dtypes(storage)
    sizes = {name: numbers.get(name, 0) * dtype.itemsize for name, dtype in dtypes.items()}
    sizes["weight"] = packed_bytes(num_weights, fmt.bits)
    if storage.zero_kind == "codes":
        sizes["zeros"] = -(-num_scales * ZERO_BITS[fmt.bits] // 8)
    return sizes | ({"channels": 2 * shape[1]} if storage.channels else {})


def _store_scales(scales: Tensor, kind: ScaleKind) -> Scales:
    """Scales, float32 [S], as they are kept; no zeros yet."""
    if kind == "dynamic":
        return quantize_scales(scales)
    if kind == "linear":
        return linear_scales(scales)
    none = scales.new_empty(0)
    return Scales(scales.to(SCALE_DTYPES[kind]), none, none)


def _groups(flat: Tensor, group_size: int) -> Iterator[Tensor]:
    """Groups [N, G] of one slice after the other, then the last one if it is short."""
    whole = flat.numel() // group_size * group_size
    step = -(-SLICE // group_size) * group_size
    for at in range(0, whole, step):
        yield flat[at : min(at + step, whole)].view(-1, group_size)
    if whole < flat.numel():
        yield flat[whole:].unsqueeze(0)
