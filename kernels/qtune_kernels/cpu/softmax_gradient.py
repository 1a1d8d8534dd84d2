"""Logits -> cross entropy, and their gradient in the same place, row by row.

Three passes over a row, which stays in the second-level cache: the largest logit, the sum of
exponentials, the gradient.
"""

import math

import torch
from torch import Tensor

from qtune_kernels.cpu.jit import Integer, KernelCode, Number, Pointer, available, kernel
from qtune_kernels.cpu.math import exp
from qtune_kernels.cpu.simd import BF16, F32, I64, LANES, Value

SIZE = 2


@kernel
def _softmax_gradient(
    code: KernelCode,
    logits: Pointer,
    targets: Pointer,
    behind: Pointer,
    sums: Pointer,
    num_rows: Integer,
    vocabulary: Integer,
    scale: Number,
    *,
    with_gradient: bool,
) -> None:
    """`behind` gets by how much the target is below the largest, `sums` the exponentials' sum."""
    whole = vocabulary // LANES * LANES
    live = code.first_lanes(vocabulary - whole)
    factor = code.spread(scale)

    def read(at: Value, tail: bool) -> Value:
        x = code.read(at, BF16, live if tail else None) * factor
        return code.select(live, x, -math.inf) if tail else x

    with code.share(num_rows) as row:
        start = logits + row * vocabulary * SIZE
        end = start + whole * SIZE
        top = code.variable(read(end, True))
        with code.loop(whole, 0, LANES) as column:
            top.set(code.largest(top.get(), read(start + column * SIZE, False)))
        most = code.max(top.get())
        total = code.variable(exp(code, read(end, True) - most))
        with code.loop(whole, 0, LANES) as column:
            total.set(total.get() + exp(code, read(start + column * SIZE, False) - most))
        total_of_row = code.sum(total.get())
        target_at = start + code.load(targets + row * 8, I64) * SIZE
        target = code.load(target_at, BF16).to(F32) * scale
        code.store(most - target, behind + row * 4)
        code.store(total_of_row, sums + row * 4)
        if with_gradient:
            share = code.spread(scale / total_of_row)
            with code.loop(whole, 0, LANES) as column:
                at = start + column * SIZE
                code.write(exp(code, read(at, False) - most) * share, at, BF16)
            code.write(exp(code, read(end, True) - most) * share, end, BF16, live)
            p = exp(code, code.spread(target - most)) * share
            code.store((p[0] - scale).to(BF16), target_at)


def takes(logits: Tensor, softcap: float | None) -> bool:
    """Whether the kernel does these logits on this machine."""
    return logits.dtype == torch.bfloat16 and softcap is None and available()


def softmax_losses(logits: Tensor, targets: Tensor, scale: float, *, with_gradient: bool) -> Tensor:
    """Losses, float32 [N], of contiguous bf16 logits [N, V]; their gradient in their place."""
    behind, sums = (logits.new_empty(len(targets), dtype=torch.float32) for _ in range(2))
    addresses = (t.data_ptr() for t in (logits, targets, behind, sums))
    _softmax_gradient(*addresses, *logits.shape, float(scale), with_gradient=with_gradient)
    return behind.add_(sums.log_())
