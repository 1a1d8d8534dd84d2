"""The forward kernel called with tasks made by hand, and its machine code.

Whole calls are tested in test_attention.py.
"""

import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from qtune_kernels.cpu import attention_forward, jit, tiles
from qtune_kernels.cpu.attention_schedule import NO_WINDOW, Task

pytestmark = pytest.mark.skipif(not tiles.available(), reason="this processor has no AMX")

ROWS, HEADS, WIDTH, SCALE = 75, 2, 32, 0.3


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def assembly() -> str:
    return jit.assembly(attention_forward.forward.text(width=WIDTH))


def run(q: Tensor, k: Tensor, v: Tensor, tasks: list[Task]) -> list[Tensor]:
    """y, greatest scores and sums of weights, NaN where no task has written."""
    y = torch.full_like(q, torch.nan)
    maxima, sums = (torch.full((HEADS, ROWS), torch.nan) for _ in range(2))
    dealt, starts = torch.tensor(tasks), torch.tensor([0, len(tasks)])
    num_bytes = attention_forward.scratch_bytes(3, WIDTH)
    memory = torch.full((num_bytes,), 0xFF, dtype=torch.uint8)
    sources = [x for t in (q, k, v) for x in (t.data_ptr(), t.stride(0) * 2, t.stride(1) * 2)]
    attention_forward.forward(
        y.data_ptr(),
        y.stride(0) * 2,
        maxima.data_ptr(),
        sums.data_ptr(),
        ROWS,
        *sources,
        SCALE,
        NO_WINDOW,
        dealt.data_ptr(),
        starts.data_ptr(),
        HEADS,
        memory.data_ptr(),
        num_bytes,
        3,
        width=WIDTH,
    )
    return [y, maxima, sums]


def operands() -> list[Tensor]:
    return [torch.randn(ROWS, heads, WIDTH).bfloat16() for heads in (HEADS, 1, 1)]


def truth(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    q, k, v = (tensor.double() for tensor in (q, k, v))
    scores = torch.einsum("thd,sd->hts", q, k[:, 0]) * SCALE
    scores = scores.masked_fill(torch.ones(ROWS, ROWS).triu(1).bool(), -torch.inf)
    maxima = scores.amax(-1)
    weights = (scores - maxima[..., None]).exp()
    y = torch.einsum("hts,sd->thd", scores.softmax(-1), v[:, 0])
    return [y, maxima, weights.sum(-1)]


def test_statistics_are_those_of_weights_before_rounding() -> None:
    inputs = operands()
    y, maxima, sums = run(*inputs, [Task(0, ROWS, 0, 0, 3)])
    right = truth(*inputs)
    torch.testing.assert_close(maxima.double(), right[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sums.double(), right[2], rtol=2e-6, atol=0)
    assert (y - right[0]).norm() < 0.004 * right[0].norm()


def test_a_task_does_its_own_blocks_as_a_whole_run_does() -> None:
    inputs = operands()
    whole = run(*inputs, [Task(0, ROWS, 0, 0, 3)])
    parts = run(*inputs, [Task(0, ROWS, 0, 1, 2)])
    for one, other, rows in zip(whole, parts, (0, 1, 1), strict=True):
        before, own, after = other.split([32, 32, ROWS - 64], rows)
        assert torch.equal(own, one.narrow(rows, 32, 32))
        assert before.isnan().all() and after.isnan().all()


def test_a_later_sample_sees_none_of_the_earlier() -> None:
    q, k, v = operands()
    k[:40], v[:40] = torch.nan, torch.nan
    y, _, sums = run(q, k, v, [Task(40, ROWS - 40, 0, 0, 2)])
    assert y[40:].isfinite().all() and y[:40].isnan().all()
    # a first query sees itself alone, and that with all the weight
    assert torch.equal(y[40, 0], v[40, 0])
    assert float(sums[0, 40]) == pytest.approx(1, abs=1e-6)


def test_products_do_nothing_but_load_and_multiply(assembly) -> None:
    blocks = [block for block in re.split(r"\n\.LBB", assembly) if "tdpbf16ps" in block]
    # of queries and keys, of weights and values
    assert len(blocks) >= 2
    for block in blocks:
        assert block.count("tileload") == block.count("tdpbf16ps") and "zmm" not in block


def test_nothing_is_gathered_and_no_mathematics_called(assembly) -> None:
    assert "gather" not in assembly
    assert set(re.findall(r"movabsq\t\$([a-z]\w+)", assembly)) <= {"omp_get_thread_num", "memset"}


def test_weights_are_rounded_by_the_processor(assembly) -> None:
    assert "vcvtne2ps2bf16" in assembly and "vcvtneps2bf16" not in assembly
