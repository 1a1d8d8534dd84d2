"""The randomised Hadamard transform of `hadamard.py` without a matrix product, for sixteen rows.

A factor of order 2 costs an addition or subtraction for each number, one of order K costs K
multiplications by 1 and -1. All stages run on sixteen rows at a time, which lie across the lanes of
a register: numbers at any distance are then combined without moving anything between lanes. Rows
are turned as they are read and turned back as they are written (16 x 16 at a time), and the factors
among sixteen neighbours are done in the registers they are read into. In between they wait in two
buffers that fit the second-level cache. Sums are float32, in another order than plain PyTorch's.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from qtune_kernels.cpu import team
from qtune_kernels.cpu.hadamard_stages import ROW_BYTES, Stage, Transform
from qtune_kernels.cpu.jit import Integer, KernelCode, Pointer, kernel
from qtune_kernels.cpu.rowwise import BYTES, name, takes
from qtune_kernels.cpu.simd import LANES
from qtune_kernels.hadamard_matrices import kronecker, orders, signs
from qtune_kernels.layout import as_rows
from qtune_kernels.scratch import scratch

# factors of 2 that are done together, in as many registers as rows are turned in
LARGEST_RADIX = LANES


class Plan(NamedTuple):
    """How rows of a width are transformed."""

    radix: int
    """Of the neighbours transformed as they are read, a power of two up to 16."""
    stages: tuple[Stage, ...]
    """What follows."""


def transforms(rows: Tensor) -> bool:
    """Whether `hadamard` takes these rows on this machine: bf16 or float32, width in sixteens."""
    return rows.is_cpu and rows.numel() > 0 and rows.shape[-1] % LANES == 0 and takes(rows)


def hadamard(x: Tensor, transposed: bool, seed: int) -> Tensor:
    """x R, or x R^T where `transposed`, in the shape [..., I] and dtype of x."""
    y, width = x.new_empty(x.shape), x.shape[-1]
    rows = as_rows(x, width)
    buffer_bytes = 2 * width * ROW_BYTES
    buffers = scratch("hadamard", team.num_workers() * buffer_bytes, torch.uint8)
    _hadamard(
        y.data_ptr(),
        rows.data_ptr(),
        len(rows),
        rows.stride(0) * rows.itemsize,
        _signs(width, seed).data_ptr(),
        _matrices(width, transposed).data_ptr(),
        buffers.data_ptr(),
        width=width,
        dtype=name(rows),
        plan=_plan(width),
        transposed=transposed,
    )
    return y


@kernel
def _hadamard(
    code: KernelCode,
    out: Pointer,
    rows: Pointer,
    num_rows: Integer,
    stride: Integer,
    signs: Pointer,
    matrices: Pointer,
    buffers: Pointer,
    *,
    width: int,
    dtype: str,
    plan: Plan,
    transposed: bool,
) -> None:
    buffer_bytes = width * ROW_BYTES
    source = buffers + code.worker * (2 * buffer_bytes)
    target = source + buffer_bytes
    transform = Transform(code, width, dtype, signs)
    with code.share((num_rows + (LANES - 1)) // LANES) as block:
        first, last = block * LANES, num_rows - 1
        # rows past the last one are the last one again
        numbers = [code.smaller(first + row, last) for row in range(LANES)]
        transform.read(
            [rows + number * stride for number in numbers], source, plan.radix, transposed
        )
        ends, done = (source, target), 0
        for stage in plan.stages:
            transform.apply(stage, matrices + 4 * done, *ends)
            ends, done = (ends[1], ends[0]), done + stage.num_numbers
        row_bytes = width * BYTES[dtype]
        transform.write(ends[0], [out + number * row_bytes for number in numbers], transposed)


@cache
def _plan(width: int) -> Plan:
    num_blocks, factors = orders(width)
    twos = sum(order == 2 for order in factors)
    near = min(twos, LARGEST_RADIX.bit_length() - 1)
    stages, stride = [], 1 << near
    far = twos - near
    while far:
        step = min(far, LARGEST_RADIX.bit_length() - 1)
        stages.append(Stage(1 << step, stride, True))
        stride, far = stride << step, far - step
    for order in reversed([order for order in factors if order > 2]):
        stages.append(Stage(order, stride, False))
        stride *= order
    assert stride * num_blocks == width
    return Plan(1 << near, tuple(stages))


@cache
def _matrices(width: int, transposed: bool) -> Tensor:
    """The dense factors in the order of stages, as they are read: blocks of outputs by inputs."""
    with torch.inference_mode(False):
        parts = [torch.zeros(1)]
        for stage in _plan(width).stages:
            if not stage.fast:
                matrix = kronecker((stage.order,)).float()
                matrix = matrix.T if transposed else matrix  # [inputs, outputs]
                parts += [matrix[:, part].flatten() for part in stage.outputs()]
        return torch.cat(parts)[1:].contiguous()


@cache
def _signs(width: int, seed: int) -> Tensor:
    """The signs, times what makes the transform orthogonal."""
    with torch.inference_mode(False):
        return signs(width, seed).float() / math.sqrt(width // orders(width).num_blocks)
