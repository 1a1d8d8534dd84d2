"""The CUDA kernel of `hadamard`: rows are read once, multiplied by up to three small matrices.

A row of n = A B C numbers is a block of that shape, and each side of it meets a matrix of its own
on tensor cores. The first product takes the inputs as they are; the others take float32 sums as a
bfloat16 number and what it leaves out, which together hold 16 bits. Matrices of 1 and -1 are exact
in every dtype. The outermost one may be wide, so it comes in strips; a program holds several rows
where these are narrow. Left to the plain version are float32, which tensor cores would cut off,
widths whose block is too large for a program's registers (53248), and before sm_90 those above
8192, whose registers the compiler spills there.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from qtune_kernels.hadamard_matrices import LARGEST_ORDER, kronecker, orders, signs

# the least side of a tensor core's operand
_LEAST = 16
# sums in the registers of a program on sm_90 and before, and of a thread
_MAX_SUMS = 1 << 15
_MAX_SUMS_BEFORE = 1 << 13
_THREAD_SUMS = 64
_WANTED_SUMS = 1 << 13
# of the outermost matrix, so many columns at a time; the others are whole in shared memory
_STRIP = 64
_WIDEST = 128
# what a further product costs, in widths of a matrix
_PRODUCT = 32
_WARP = 32


class Tile(NamedTuple):
    """The orders of the three matrices, 1 where there is none, and rows of a program."""

    groups: tuple[tuple[int, ...], ...]
    sizes: tuple[int, int, int]
    padded: tuple[int, int, int]
    rows: int

    @property
    def sums(self) -> int:
        """Of a program."""
        return math.prod(self.padded) * self.rows


def takes(x: Tensor) -> bool:
    """Whether the kernel does this width and dtype."""
    return x.dtype.itemsize == 2 and x.numel() > 0 and _tile_on(x) is not None


def hadamard(x: Tensor, transposed: bool, seed: int) -> Tensor:
    """x R or x R^T [..., I]; only where `takes` says so."""
    plan = _tile_on(x)
    assert plan is not None
    num_blocks = orders(x.shape[-1]).num_blocks
    width = x.shape[-1] // num_blocks
    x = x.contiguous()
    y = torch.empty_like(x)
    num_rows = x.numel() // width
    matrices = _matrices(plan, transposed, x.dtype, x.device)
    with torch.cuda.device_of(x):
        _hadamard_kernel[(triton.cdiv(num_rows, plan.rows),)](
            x,
            y,
            _signs(x.shape[-1], seed, x.device),
            *matrices,
            num_rows,
            num_blocks,
            1 / math.sqrt(width),
            **constants(plan, transposed),
            num_warps=warps(plan),
            enable_fp_fusion=True,
        )
    return y


def constants(plan: Tile, transposed: bool) -> dict[str, int | bool]:
    """The compile-time arguments of the kernel."""
    named = dict(zip(("A", "B", "C"), plan.sizes, strict=True))
    named |= dict(zip(("A_PAD", "B_PAD", "C_PAD"), plan.padded, strict=True))
    strip = min(_STRIP, plan.padded[0])
    return named | {"ROWS": plan.rows, "STRIP": strip, "TRANSPOSED": transposed}


def warps(plan: Tile) -> int:
    """Of a program, 4 to 16."""
    return max(4, min(16, plan.sums // (_WARP * _THREAD_SUMS)))


@cache
def tile(width: int, modern: bool = True) -> Tile | None:
    """How rows of that width are transformed, or None where a program cannot hold one.

    `modern` is for sm_90 and what follows.
    """
    found = [_tile(groups) for groups in _threes(orders(width).factors)]
    return min((one for one in found if _fits(one, modern)), key=_cost, default=None)


def _fits(plan: Tile, modern: bool) -> bool:
    outermost, *others = plan.padded
    narrow = outermost <= LARGEST_ORDER and max(others) <= _WIDEST
    return narrow and plan.sums <= (_MAX_SUMS if modern else _MAX_SUMS_BEFORE)


def _tile_on(x: Tensor) -> Tile | None:
    modern = not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (9, 0)
    return tile(x.shape[-1], modern)


def _tile(groups: tuple[tuple[int, ...], ...]) -> Tile:
    a, b, c = (math.prod(group) for group in groups)
    padded = max(_LEAST, _padded(a)), _padded(b), _padded(c)
    rows = max(1, _WANTED_SUMS // math.prod(padded))
    return Tile(groups, (a, b, c), padded, rows)


def _padded(size: int) -> int:
    """The side of an operand that holds so many; 1 where there is nothing to multiply."""
    return max(_LEAST, triton.next_power_of_2(size)) if size > 1 else 1


def _cost(plan: Tile) -> float:
    products = sum(size + _PRODUCT for size in plan.padded if size > 1)
    return products * math.prod(plan.padded) / math.prod(plan.sizes)


def _threes(factors: tuple[int, ...]) -> list[tuple[tuple[int, ...], ...]]:
    """All ways to part the factors in three, of which the last ones may be empty."""
    ends = range(len(factors) + 1)
    cuts = [(first, second) for first in ends for second in ends[first:]]
    return [(factors[:one], factors[one:two], factors[two:]) for one, two in cuts]


@cache
def _matrices(
    plan: Tile, transposed: bool, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """What rows are multiplied by, filled up with zeros; the first from the left, so transposed."""
    made = []
    for place, (group, size) in enumerate(zip(plan.groups, plan.padded, strict=True)):
        matrix = kronecker(group)
        turned = matrix.T if (place == 0) != transposed else matrix
        kind = dtype if place == 0 else torch.bfloat16
        room = size - len(matrix)
        made.append(pad(turned, (0, room, 0, room)).to(device, kind).contiguous())
    return made


@cache
def _signs(width: int, seed: int, device: torch.device) -> Tensor:
    return signs(width, seed).to(device, torch.int8)


@triton.jit
def _times(rows, matrix_ptr, SIZE: tl.constexpr):
    """Float32 rows [M, SIZE] times a matrix [SIZE, SIZE], with at least 16 bits of the rows."""
    side = tl.arange(0, SIZE)
    matrix = tl.load(matrix_ptr + side[:, None] * SIZE + side[None, :])
    high = rows.to(tl.bfloat16)
    low = (rows - high.to(tl.float32)).to(tl.bfloat16)
    return tl.dot(low, matrix, tl.dot(high, matrix))


@triton.jit
def _hadamard_kernel(
    x_ptr,
    y_ptr,
    signs_ptr,
    first_ptr,
    second_ptr,
    third_ptr,
    num_rows,
    num_blocks,
    scale,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    A_PAD: tl.constexpr,
    B_PAD: tl.constexpr,
    C_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    STRIP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    # rows lie side by side: a column is a row's number, then its place within B and C
    COLUMNS: tl.constexpr = ROWS * B_PAD * C_PAD
    column = tl.arange(0, COLUMNS)
    row = tl.program_id(0).to(tl.int64) * ROWS + column // (B_PAD * C_PAD)
    b, c = column // C_PAD % B_PAD, column % C_PAD
    live = (row < num_rows) & (b < B) & (c < C)
    place = b * C + c
    row_at = (row * (A * B * C) + place)[None, :]
    sign_at = (row % num_blocks * (A * B * C) + place)[None, :]
    outer = tl.arange(0, A_PAD)[:, None]
    sums = tl.full((A_PAD, COLUMNS), 0.0, tl.float32)
    for start in range(0, A, STRIP):
        a = start + tl.arange(0, STRIP)[:, None]
        here = live[None, :] & (a < A)
        x = tl.load(x_ptr + row_at + a * (B * C), mask=here, other=0.0)
        if not TRANSPOSED:
            x *= tl.load(signs_ptr + sign_at + a * (B * C), mask=here, other=0).to(x.dtype)
        first = tl.load(first_ptr + outer * A_PAD + start + tl.arange(0, STRIP)[None, :])
        sums = tl.dot(first, x, sums)
    if C_PAD > 1:
        sums = tl.reshape(sums, [A_PAD * ROWS * B_PAD, C_PAD])
        sums = _times(sums, third_ptr, C_PAD)
        sums = tl.reshape(sums, [A_PAD, COLUMNS])
    if B_PAD > 1:
        sums = tl.reshape(sums, [A_PAD * ROWS, B_PAD, C_PAD])
        sums = tl.reshape(tl.permute(sums, (0, 2, 1)), [A_PAD * ROWS * C_PAD, B_PAD])
        sums = _times(sums, second_ptr, B_PAD)
        sums = tl.permute(tl.reshape(sums, [A_PAD * ROWS, C_PAD, B_PAD]), (0, 2, 1))
        sums = tl.reshape(sums, [A_PAD, COLUMNS])
    here = live[None, :] & (outer < A)
    sums *= scale
    if TRANSPOSED:
        sums *= tl.load(signs_ptr + sign_at + outer * (B * C), mask=here, other=0)
    tl.store(y_ptr + row_at + outer * (B * C), sums.to(y_ptr.dtype.element_ty), mask=here)
