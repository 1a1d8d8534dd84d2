"""What kernels share that go over rows: which tensors they take, and the walk along a row.

The width of rows is fixed when a kernel is compiled. A model has a handful of them, and what is
left at the end of a row then costs a mask and no branch.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from qtune_kernels.cpu.jit import available
from qtune_kernels.cpu.simd import BF16, F32, LANES, Code, Value

NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
KINDS = {"bf16": BF16, "fp32": F32}
BYTES = {"bf16": 2, "fp32": 4}
# vectors in one round of the loop: as many sums can then be under way at once
UNROLL = 4


def takes(*tensors: Tensor | None) -> bool:
    """Whether kernels run here, on these: one dtype, bf16 or float32; None counts for nothing."""
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    return len(dtypes) == 1 and dtypes <= NAMES.keys() and available()


def name(tensor: Tensor) -> str:
    """What kernels call the dtype of a tensor."""
    return NAMES[tensor.dtype]


def walk(code: Code, width: int, visit: Callable[[Value, int, Value | None], None]) -> None:
    """Call `visit(column, turn, live)` for the vectors of a row, to write what happens there.

    `column` is that of the first lane, i64; `turn` says which of UNROLL vectors that follow each
    other it is; `live` are the lanes within the row, None where all are.
    """
    step = UNROLL * LANES
    whole = width // step * step
    with code.loop(whole, 0, step) as start:
        for turn in range(UNROLL):
            visit(start + turn * LANES, turn, None)
    for turn, column in enumerate(range(whole, width, LANES)):
        left = width - column
        live = code.first_lanes(code.integer(left)) if left < LANES else None
        visit(code.integer(column), turn, live)
