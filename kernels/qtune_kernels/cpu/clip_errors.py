"""The CPU kernel of `clip_errors`: a group stays in the cache while all choices are tried on it."""

import torch
from torch import Tensor

from qtune_kernels.cpu.jit import Integer, KernelCode, Pointer, available, kernel
from qtune_kernels.cpu.nearest import Nearest, divisor, nearest_whole, tables
from qtune_kernels.cpu.rowwise import walk
from qtune_kernels.cpu.simd import F32, Code, Value, vector
from qtune_kernels.packing import code_bits


def takes(groups: Tensor) -> bool:
    """Whether the kernel runs here, on these groups."""
    return groups.is_cpu and groups.dtype == torch.float32 and available()


def clip_errors(
    groups: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    levels: tuple[float, ...],
    importance: Tensor | None,
) -> Tensor:
    """Squared errors, float32 [K, N], of groups [N, G] for scales and zeros [K, N]."""
    groups, scales = groups.contiguous(), scales.contiguous()
    zeros = None if zeros is None else zeros.contiguous()
    if importance is not None:
        importance = _by_rows(importance.expand_as(groups))
    errors = torch.empty_like(scales)
    _clip_errors(
        errors.data_ptr(),
        groups.data_ptr(),
        len(groups),
        scales.data_ptr(),
        0 if zeros is None else zeros.data_ptr(),
        len(scales),
        tables(levels).data_ptr() if levels else 0,
        0 if importance is None else importance.data_ptr(),
        0 if importance is None else importance.stride(0) * 4,
        group_size=groups.shape[1],
        bits=code_bits(levels),
        shifted=zeros is not None,
        weighted=importance is not None,
    )
    return errors


def _by_rows(importance: Tensor) -> Tensor:
    """The same float32 rows, which may all be one, each with its elements side by side."""
    usable = importance.dtype == torch.float32 and importance.stride(1) == 1
    return importance if usable else importance.float().contiguous()


@kernel
def _clip_errors(
    code: KernelCode,
    errors: Pointer,
    groups: Pointer,
    num_groups: Integer,
    scales: Pointer,
    zeros: Pointer,
    num_choices: Integer,
    tables: Pointer,
    importance: Pointer,
    importance_stride: Integer,
    *,
    group_size: int,
    bits: int,
    shifted: bool,
    weighted: bool,
) -> None:
    nearest = Nearest(code, tables, bits) if bits < 8 else None
    with code.share(num_groups) as group, code.loop(num_choices) as choice:
        place = (choice * num_groups + group) * 4
        scale = code.load(scales + place, F32)
        zero = code.spread(code.load(zeros + place, F32)) if shifted else None
        tried = Choice(code, nearest, scale, zero, bits)
        total = code.variable(code.value(0.0, vector(F32)))

        def add(column: Value, turn: int, live: Value | None) -> None:
            at = column * 4
            weights = code.read(groups + group * (group_size * 4) + at, F32, live)
            off = tried.made(weights) - weights
            squares = off * off
            if weighted:
                row = importance + group * importance_stride
                squares = squares * code.read(row + at, F32, live)
            if live is not None:
                squares = code.select(live, squares, 0)
            total.set(total.get() + squares)

        walk(code, group_size, add)
        code.store(code.sum(total.get()), errors + place)


class Choice:
    """A scale and a zero for a group, and what weights become with them."""

    def __init__(
        self, code: Code, nearest: Nearest | None, scale: Value, zero: Value | None, bits: int
    ) -> None:
        self._code, self._nearest, self._zero = code, nearest, zero
        self._scale, self._divisor = code.spread(scale), code.spread(divisor(code, scale, bits))

    def made(self, weights: Value) -> Value:
        """Sixteen weights, encoded and decoded."""
        by, zero = self._divisor, self._zero
        ratios = weights / by if self._nearest is None else weights * by
        levels = self._levels(ratios if zero is None else ratios + zero)
        return (levels if zero is None else levels - zero) * self._scale

    def _levels(self, ratios: Value) -> Value:
        if self._nearest is None:
            return nearest_whole(self._code, ratios)
        return self._nearest.level(self._nearest.rank(ratios))
