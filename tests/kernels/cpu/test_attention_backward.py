"""The backward kernel called with tasks made by hand, and its machine code.

Whole calls are tested in test_attention.py.
"""

import re
from collections.abc import Iterator

import pytest
import torch
from samples import error
from torch import Tensor

from qtune_kernels.cpu import attention_backward, jit, tiles
from qtune_kernels.cpu.attention_schedule import NO_WINDOW, Task

pytestmark = pytest.mark.skipif(not tiles.available(), reason="this processor has no AMX")

# the sample begins behind rows that nobody asks about; both heads share their keys
FIRST, LENGTH, HEADS, WIDTH, SCALE = 5, 70, 2, 32, 0.3
ROWS, BLOCKS = FIRST + LENGTH, 3
OWN = slice(FIRST, ROWS)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def assembly() -> str:
    return jit.assembly(attention_backward.backward.text(width=WIDTH, wide=False))


def operands(rows: int = ROWS) -> list[Tensor]:
    """dy, q, k and v."""
    return [torch.randn(rows, heads, WIDTH).bfloat16() for heads in (HEADS, HEADS, 1, 1)]


def truth(dy: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, list[Tensor]]:
    """lse [H, T], and dq, dk and dv [T, H, D] of each head, float64."""
    dy, q, k, v = (tensor.double() for tensor in (dy, q, k, v))
    k, v = k.expand_as(q), v.expand_as(q)
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    scores = torch.einsum("thd,shd->hts", *leaves[:2]) * SCALE
    scores = scores.masked_fill(torch.ones(len(q), len(q)).triu(1).bool(), -torch.inf)
    y = torch.einsum("hts,shd->thd", scores.softmax(-1), leaves[2])
    return scores.detach().logsumexp(-1), list(torch.autograd.grad(y, leaves, dy))


def run(inputs: list[Tensor], lse: Tensor, task: Task, heads: int, chunk: int = 2) -> list[Tensor]:
    """dq, dk and dv, NaN where the task has not written; `heads` is how many it has."""
    rows, apart = len(inputs[0]), heads < HEADS
    dq = torch.full((rows, HEADS, WIDTH), torch.nan, dtype=torch.bfloat16)
    kind = torch.float32 if apart else torch.bfloat16
    dk, dv = (torch.full((rows, HEADS // heads, WIDTH), torch.nan, dtype=kind) for _ in range(2))
    tasks, starts = torch.tensor([task]), torch.tensor([0, 1])
    num_bytes = attention_backward.scratch_bytes(BLOCKS, chunk, WIDTH)
    memory = torch.full((num_bytes,), 0xFF, dtype=torch.uint8)
    attention_backward.backward(
        dq.data_ptr(),
        dq.stride(0) * 2,
        dk.data_ptr(),
        dv.data_ptr(),
        dk.stride(0) * dk.itemsize,
        *(x for t in inputs for x in (t.data_ptr(), t.stride(0) * 2, t.stride(1) * 2)),
        lse.data_ptr(),
        rows,
        SCALE,
        NO_WINDOW,
        tasks.data_ptr(),
        starts.data_ptr(),
        heads,
        HEADS,
        chunk,
        memory.data_ptr(),
        num_bytes,
        BLOCKS,
        width=WIDTH,
        wide=apart,
    )
    return [dq, dk, dv]


def own_truth(inputs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """lse float32 [H, T], NaN before the sample, and gradients of the sample alone."""
    lse = torch.full((HEADS, ROWS), torch.nan)
    found, gradients = truth(*(tensor[OWN] for tensor in inputs))
    lse[:, OWN] = found
    return lse, gradients


def test_gradients_of_a_sample_whose_heads_share_keys() -> None:
    inputs = operands()
    lse, (dq, dk, dv) = own_truth(inputs)
    found = run(inputs, lse, Task(FIRST, LENGTH, 0, 0, BLOCKS), heads=2)
    right = (dq, dk.sum(1, keepdim=True), dv.sum(1, keepdim=True))
    for one, other in zip(found, right, strict=True):
        assert error(one[OWN], other) < 0.005
        assert one[:FIRST].isnan().all()


def test_a_head_alone_leaves_its_unscaled_part() -> None:
    inputs = operands()
    lse, (dq, dk, dv) = own_truth(inputs)
    found = run(inputs, lse, Task(FIRST, LENGTH, 1, 0, BLOCKS), heads=1)
    for one, other in zip(found, (dq, dk / SCALE, dv), strict=True):
        assert error(one[OWN, 1], other[:, 1]) < 0.005
        assert one[:, 0].isnan().all() and one[:FIRST].isnan().all()


def test_gradients_of_scores_add_up_to_nothing() -> None:
    # with equal keys dq is their sum; delta taken from rounded outputs would leave 1e-2 of it
    dy, q, k, v = operands(2)
    k[1] = k[0]
    lse, _ = truth(dy, q, k, v)
    dq, _, dv = run([dy, q, k, v], lse.float(), Task(0, 2, 0, 0, 1), heads=2)
    assert dq.abs().max() < 1e-5
    assert dv.isfinite().all() and dv.any()


def test_a_query_is_weighed_by_its_lse() -> None:
    dy, q, k, v = operands(2)
    lse, _ = truth(dy, q, k, v)
    # of twice the sum of weights, half of each: of dv too, which is linear in them
    halved = lse.float() + torch.tensor(2.0).log()
    task = Task(0, 2, 0, 0, 1)
    *_, whole = run([dy, q, k, v], lse.float(), task, heads=2)
    *_, half = run([dy, q, k, v], halved, task, heads=2)
    assert error(2 * half, whole.double()) < 0.005


def test_products_do_nothing_but_load_and_multiply(assembly) -> None:
    blocks = [block for block in re.split(r"\n\.LBB", assembly) if "tdpbf16ps" in block]
    # of both kinds of scores, of dq, of dk and of dv
    assert len(blocks) >= 4
    for block in blocks:
        assert block.count("tileload") == block.count("tdpbf16ps") and "zmm" not in block


def test_nothing_is_gathered_and_no_mathematics_called(assembly) -> None:
    assert "gather" not in assembly
    assert set(re.findall(r"movabsq\t\$([a-z]\w+)", assembly)) <= {"omp_get_thread_num", "memset"}


def test_weights_are_rounded_by_the_processor(assembly) -> None:
    assert "vcvtne2ps2bf16" in assembly and "vcvtneps2bf16" not in assembly
