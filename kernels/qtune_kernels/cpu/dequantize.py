"""Codes -> weights in one pass, sixteen at a time."""

import torch
from torch import Tensor

from qtune_kernels.cpu.decode import Packed
from qtune_kernels.cpu.jit import Integer, KernelCode, Pointer, available, kernel
from qtune_kernels.cpu.product import level_table
from qtune_kernels.cpu.simd import BF16, F32, LANES
from qtune_kernels.packing import SEGMENT, code_bits
from qtune_kernels.scales import Scales, dynamic_map

KINDS = {torch.float32: F32, torch.bfloat16: BF16}


@kernel
def _dequantize(
    code: KernelCode,
    weights: Pointer,
    num_segments: Integer,
    packed: Pointer,
    scale_codes: Pointer,
    scale_scales: Pointer,
    scale_offset: Pointer,
    scale_map: Pointer,
    levels: Pointer,
    *,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
) -> None:
    scales = (scale_codes, scale_scales, scale_offset, scale_map)
    matrix = Packed(code, packed, *scales, levels, bits=bits, group_size=group_size)
    with code.share(num_segments) as segment:
        at = segment * SEGMENT
        for part, weight in enumerate(matrix.weights(at, SEGMENT // LANES)):
            address = weights + (at + LANES * part) * dtype.itemsize
            code.write(weight, address, KINDS[dtype])


def dequantizes(flat: Tensor) -> bool:
    """Whether `dequantize_into` can fill this tensor on this machine."""
    whole = flat.numel() % SEGMENT == 0
    return whole and flat.is_cpu and flat.dtype in KINDS and available()


def dequantize_into(
    flat: Tensor, packed: Tensor, scales: Scales, levels: tuple[float, ...], group_size: int
) -> None:
    """Write the weights into `flat`, [weights in whole segments] of float32 or bf16."""
    tables = (*scales, dynamic_map(packed.device), level_table(levels))
    _dequantize(
        flat.data_ptr(),
        flat.numel() // SEGMENT,
        packed.data_ptr(),
        *(table.data_ptr() for table in tables),
        bits=code_bits(levels),
        group_size=group_size,
        dtype=flat.dtype,
    )
