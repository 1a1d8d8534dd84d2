"""The attention kernels on tensors: what they take, and how the work is cut.

What is a task, and the order of its sums, follow from the shapes alone: results are the same bits
whichever threads compute them, and however many there are.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qtune_kernels.cpu import attention_backward, attention_forward, team, tiles
from qtune_kernels.cpu.attention_schedule import BLOCK, NO_WINDOW, Schedule, schedule
from qtune_kernels.cpu.attention_tiles import WEIGHTS_BYTES
from qtune_kernels.scratch import scratch

# query blocks of a forward task, each of which arranges its keys anew
RUN = 16
WIDEST = 256
# what the weights of a chunk of queries may take of the second-level cache, twice
CHUNK_BYTES = 1 << 19
# fewest query blocks of a chunk, however long the sample
LEAST_CHUNK = 4
# tasks below which each query head is one, whatever the number of threads
FEWEST_TASKS = 8


def attends(q: Tensor, k: Tensor, v: Tensor, scale: float) -> bool:
    """Whether the kernels take these: bf16 on a processor with AMX, heads of 32, 64, ... 256."""
    width = q.shape[-1]
    sized = 0 < width <= WIDEST and width % BLOCK == 0 and k.shape == v.shape and len(q) > 0
    typed = all(t.dtype == torch.bfloat16 for t in (q, k, v))
    # the greatest score is the greatest scaled one only under a positive scale
    return sized and typed and scale > 0 and tiles.available()


def forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """y [T, H, D] bf16 and lse float32 [H, T]; see `packed_attention`."""
    q, k, v = (_with_whole_rows(tensor) for tensor in (q, k, v))
    (rows, heads, width), group = q.shape, q.shape[1] // k.shape[1]
    y = q.new_empty(q.shape)
    maxima, sums = (q.new_empty(heads, rows, dtype=torch.float32) for _ in range(2))
    window = min(window, NO_WINDOW) or NO_WINDOW
    plan = schedule(tuple(lengths), range(0, heads, group), window, RUN, team.num_workers())
    memory = attention_forward.scratch_bytes(plan.most_blocks, width)
    attention_forward.forward(
        y.data_ptr(),
        y.stride(0) * 2,
        maxima.data_ptr(),
        sums.data_ptr(),
        rows,
        *_placed(q),
        *_placed(k),
        *_placed(v),
        float(scale),
        window,
        *_tasks(plan),
        group,
        *_memory(memory),
        plan.most_blocks,
        width=width,
    )
    return y, maxima.add_(sums.log_())


def backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    lengths: Sequence[int],
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq [T, H, D], dk and dv [T, K, D], bf16; see `packed_attention_backward`."""
    dy, q, k, v = (_with_whole_rows(tensor) for tensor in (dy, q, k, v))
    lse = lse.contiguous()
    (rows, heads, width), group = q.shape, q.shape[1] // k.shape[1]
    apart = group > 1 and len(lengths) * k.shape[1] < FEWEST_TASKS
    together = 1 if apart else group
    dq = q.new_empty(q.shape)
    shape = (rows, heads // together, width)
    dk, dv = (k.new_empty(shape, dtype=torch.float32 if apart else k.dtype) for _ in range(2))
    window = min(window, NO_WINDOW) or NO_WINDOW
    tasks = range(0, heads, together)
    plan = schedule(tuple(lengths), tasks, window, rows, team.num_workers())
    chunk = max(LEAST_CHUNK, CHUNK_BYTES // (plan.most_blocks * WEIGHTS_BYTES))
    chunk = min(chunk, plan.most_blocks)
    memory = attention_backward.scratch_bytes(plan.most_blocks, chunk, width)
    attention_backward.backward(
        dq.data_ptr(),
        dq.stride(0) * 2,
        dk.data_ptr(),
        dv.data_ptr(),
        dk.stride(0) * dk.itemsize,
        *_placed(dy),
        *_placed(q),
        *_placed(k),
        *_placed(v),
        lse.data_ptr(),
        rows,
        float(scale),
        window,
        *_tasks(plan),
        together,
        group,
        chunk,
        *_memory(memory),
        plan.most_blocks,
        width=width,
        wide=apart,
    )
    if apart:
        dk, dv = _sum_heads(dk, group).mul_(scale).to(k.dtype), _sum_heads(dv, group).to(v.dtype)
    return dq, dk, dv


def _sum_heads(parts: Tensor, group: int) -> Tensor:
    """The sums over the query heads of each key head, in their order as the kernel adds them."""
    first, *others = parts.unflatten(1, (-1, group)).unbind(2)
    total: Tensor = first.clone()
    for other in others:
        total += other
    return total


def _with_whole_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()


def _placed(tensor: Tensor) -> tuple[int, int, int]:
    """Address, and bytes from row to row and from head to head."""
    return tensor.data_ptr(), tensor.stride(0) * 2, tensor.stride(1) * 2


def _tasks(plan: Schedule) -> tuple[int, int]:
    return plan.tasks.data_ptr(), plan.starts.data_ptr()


def _memory(thread_bytes: int) -> tuple[int, int]:
    """Address of the scratch memory, and bytes of it for each thread."""
    # the first call asks the system for the registers; without them the process would be killed
    assert tiles.available()
    memory = scratch("attention", team.num_workers() * thread_bytes, torch.uint8)
    return memory.data_ptr(), thread_bytes
