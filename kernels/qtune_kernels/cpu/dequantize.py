"""Codes -> weights in one pass, sixteen at a time, or thirty-two in bf16."""

import torch
from torch import Tensor

from qtune_kernels.cpu import coded
from qtune_kernels.cpu.decode import HALVES, Packed
from qtune_kernels.cpu.groups import Layout, Places
from qtune_kernels.cpu.jit import Integer, KernelCode, Pointer, available, kernel
from qtune_kernels.cpu.processor import features
from qtune_kernels.cpu.simd import F32, LANES
from qtune_kernels.packing import SEGMENT
from qtune_kernels.scales import Scales

DTYPES = (torch.float32, torch.bfloat16)


@kernel
def _dequantize(
    code: KernelCode,
    weights: Pointer,
    num_segments: Integer,
    packed: Pointer,
    scale_codes: Pointer,
    scale_scales: Pointer,
    scale_offset: Pointer,
    zeros: Pointer,
    scale_map: Pointer,
    levels: Pointer,
    num_groups: Integer,
    *,
    layout: Layout,
    dtype: torch.dtype,
) -> None:
    scales = (scale_codes, scale_scales, scale_offset, zeros, scale_map)
    matrix = Packed(code, Places(packed, *scales, levels, num_groups), layout)
    with code.share(num_segments) as segment:
        at = segment * SEGMENT
        if dtype == torch.bfloat16:
            for part in range(0, SEGMENT, HALVES):
                code.store(matrix.halves(at + part), weights + (at + part) * 2)
        else:
            for part, weight in enumerate(matrix.weights(at, SEGMENT // LANES)):
                code.write(weight, weights + (at + LANES * part) * 4, F32)


def dequantizes(flat: Tensor, scales: Scales, levels: tuple[float, ...], group_size: int) -> bool:
    """Whether `dequantize_into` can fill this tensor on this machine."""
    whole = flat.numel() % SEGMENT == 0
    known = coded.decodes(coded.layout(scales, levels, group_size))
    return known and whole and flat.is_cpu and flat.dtype in DTYPES and _runs()


def dequantize_into(
    flat: Tensor, packed: Tensor, scales: Scales, levels: tuple[float, ...], group_size: int
) -> None:
    """Write the weights into `flat`, [weights in whole segments] of float32 or bf16."""
    _dequantize(
        flat.data_ptr(),
        flat.numel() // SEGMENT,
        *coded.places(packed, scales, levels),
        layout=coded.layout(scales, levels, group_size),
        dtype=flat.dtype,
    )


def _runs() -> bool:
    """Whether the processor looks up words, which all do but the first with AVX-512."""
    return available() and "avx512bw" in features()
