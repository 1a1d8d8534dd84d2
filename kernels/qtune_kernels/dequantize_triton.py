"""The CUDA kernels of `dequantize`: one launch, codes and scale codes in, rounded weights out.

Levels come from `tl.gather` on a 16-entry float32 table, which the compiler keeps in shared
memory: exact, and 8 to 10 instructions a weight where a chain of selects takes 22. Products and
sums stay apart (`enable_fp_fusion=False`), so that the bits are those of the plain PyTorch
version.
"""

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtune_kernels.packing import RUN
from qtune_kernels.scales import SCALE_GROUP, Scales, dynamic_map

_HALF = tl.constexpr(RUN // 2)
_SCALE_GROUP = tl.constexpr(SCALE_GROUP)
# weights that a program of four warps writes
PROGRAM_WEIGHTS = 16384


def dequantize_into(
    flat: Tensor, packed: Tensor, scales: Scales, levels: Sequence[float], group_size: int
) -> None:
    """Write the first `flat.numel()` weights into `flat`, of any float dtype."""
    bits = 4 if levels else 8
    unit = min(group_size, RUN // 2)
    units = PROGRAM_WEIGHTS * bits // 8 // unit
    kernel = _dequantize_4bit_kernel if levels else _dequantize_8bit_kernel
    table = (levels_table(tuple(levels), packed.device),) if levels else ()
    with torch.cuda.device_of(packed):
        kernel[(triton.cdiv(packed.numel(), units * unit),)](
            packed,
            *scales,
            dynamic_map(packed.device),
            *table,
            flat,
            flat.numel(),
            GROUP=group_size,
            UNIT=unit,
            UNITS=units,
            num_warps=4,
            enable_fp_fusion=False,
        )


@cache
def levels_table(levels: tuple[float, ...], device: torch.device) -> Tensor:
    """The levels, float32 [16], on the device."""
    return torch.tensor(levels, dtype=torch.float32, device=device)


@triton.jit
def group_scale(codes_ptr, scales_ptr, offset, map_ptr, group, live):
    """Float32 scales of quantization groups; where not `live` (None: all are), nothing is read."""
    if live is None:
        code = tl.load(codes_ptr + group)
        spread = tl.load(scales_ptr + group // _SCALE_GROUP)
    else:
        code = tl.load(codes_ptr + group, mask=live, other=0)
        spread = tl.load(scales_ptr + group // _SCALE_GROUP, mask=live, other=0.0)
    return tl.load(map_ptr + code.to(tl.int32)) * spread + offset


@triton.jit
def _dequantize_4bit_kernel(
    packed_ptr,
    scale_codes_ptr,
    scale_scales_ptr,
    scale_offset_ptr,
    scale_map_ptr,
    levels_ptr,
    weights_ptr,
    num_weights,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    UNITS: tl.constexpr,
):
    # a unit is UNIT bytes whose low nibbles lie in one quantization group, as do their high ones
    BYTES: tl.constexpr = UNIT * UNITS
    first = tl.program_id(0).to(tl.int64) * (2 * BYTES)
    num_left = tl.minimum(num_weights - first, 2 * BYTES).to(tl.int32)
    byte = tl.arange(0, BYTES)
    low_at = byte + byte // _HALF * _HALF
    unit = tl.arange(0, UNITS) * UNIT
    low_unit_at = unit + unit // _HALF * _HALF
    offset = tl.load(scale_offset_ptr)
    levels = tl.load(levels_ptr + tl.arange(0, 16))
    packed = tl.load(packed_ptr + first // 2 + byte, mask=low_at < num_left, other=0)
    for plane in tl.static_range(2):
        unit_at = low_unit_at + plane * _HALF
        scale = group_scale(
            scale_codes_ptr,
            scale_scales_ptr,
            offset,
            scale_map_ptr,
            (first + unit_at) // GROUP,
            unit_at < num_left,
        )
        scale = tl.reshape(tl.broadcast_to(scale[:, None], [UNITS, UNIT]), [BYTES])
        weight = tl.gather(levels, (packed >> 4 * plane & 15).to(tl.int32), 0) * scale
        at = low_at + plane * _HALF
        weight = weight.to(weights_ptr.dtype.element_ty)
        tl.store(weights_ptr + first + at, weight, mask=at < num_left)


@triton.jit
def _dequantize_8bit_kernel(
    packed_ptr,
    scale_codes_ptr,
    scale_scales_ptr,
    scale_offset_ptr,
    scale_map_ptr,
    weights_ptr,
    num_weights,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    UNITS: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * (UNIT * UNITS)
    num_left = tl.minimum(num_weights - first, UNIT * UNITS).to(tl.int32)
    unit_at = tl.arange(0, UNITS) * UNIT
    scale = group_scale(
        scale_codes_ptr,
        scale_scales_ptr,
        tl.load(scale_offset_ptr),
        scale_map_ptr,
        (first + unit_at) // GROUP,
        unit_at < num_left,
    )
    step = tl.div_rn(scale, 127.0)
    at = unit_at[:, None] + tl.arange(0, UNIT)[None, :]
    code = tl.load(packed_ptr + first + at, mask=at < num_left, other=0)
    weight = (code.to(tl.float32) - 128.0) * step[:, None]
    weight = weight.to(weights_ptr.dtype.element_ty)
    tl.store(weights_ptr + first + at, weight, mask=at < num_left)
