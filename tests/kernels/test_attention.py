"""Packed attention against float64, natively and in plain PyTorch."""

import pytest
import torch
from samples import error

from qtune_kernels.attention import is_fused, packed_attention, packed_attention_backward
from qtune_kernels.cpu import attention as native
from qtune_kernels.cpu import tiles

LENGTHS = [(1,), (1, 31, 33, 100), (64, 3), (130,)]
# query heads, key heads, width
HEADS = [(4, 2, 64), (3, 1, 64), (2, 2, 128)]


@pytest.fixture(params=["native", "plain"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "plain":
        monkeypatch.setattr(native, "attends", lambda *arguments: False)
    elif not tiles.available():
        pytest.skip("this processor has no AMX")
    return str(request.param)


def operands(
    lengths: tuple[int, ...], heads: tuple[int, int, int], dtype: torch.dtype = torch.bfloat16
) -> list[torch.Tensor]:
    """q, k, v and dy; the first three lie as a model's projections leave them, [heads, T, D]."""
    rows, (query_heads, key_heads, width) = sum(lengths), heads
    counts = (query_heads, key_heads, key_heads)
    made = [torch.randn(count, rows, width).to(dtype).transpose(0, 1) for count in counts]
    return [*made, torch.randn(rows, query_heads, width).to(dtype)]


def truth(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: tuple[int, ...],
    scale: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y and lse, by one matrix over all samples in which most is hidden."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    at, samples = torch.arange(len(q)), torch.arange(len(lengths))
    sample = samples.repeat_interleave(torch.tensor(lengths))
    seen = (sample[:, None] == sample) & (at[:, None] >= at)
    seen &= at[:, None] - at < (window or len(q))
    scores = torch.einsum("thd,shd->hts", q, k) * scale
    scores = scores.masked_fill(~seen, -torch.inf)
    return torch.einsum("hts,shd->thd", scores.softmax(-1), v), scores.logsumexp(-1)


def results(
    run: object, inputs: list[torch.Tensor], dtype: torch.dtype, *settings: object
) -> list[torch.Tensor]:
    """y, dq, dk and dv, computed in `dtype`."""
    *leaves, dy = (tensor.detach().to(dtype).requires_grad_() for tensor in inputs)
    y = run(*leaves, *settings)[0]
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("window", [0, 1, 50])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_errors_are_at_most_twice_those_of_float32(path, lengths, heads, window) -> None:
    inputs, settings = operands(lengths, heads), (lengths, heads[2] ** -0.5, window)
    assert is_fused(*inputs[:3], settings[1]) == (path == "native")
    ours = results(packed_attention, inputs, torch.bfloat16, *settings)
    wide = results(truth, inputs, torch.float32, *settings)
    exact = results(truth, inputs, torch.float64, *settings)
    for one, other, right in zip(ours, wide, exact, strict=True):
        assert one.shape == right.shape and one.dtype == torch.bfloat16
        # where a query sees one key, gradients of scores vanish
        allowed = 2 * (other.bfloat16() - right).norm() + 1e-6 * right.numel() ** 0.5
        assert (one - right).norm() <= allowed


@pytest.mark.parametrize("sharpness", [3.0, 10.0])
@pytest.mark.parametrize("length", [2, 8, 100])
def test_few_keys_with_all_the_weight_cost_no_digits(path, length, sharpness) -> None:
    inputs, settings = operands((length,), (4, 2, 64)), ((length,), sharpness / 8, 0)
    ours = results(packed_attention, inputs, torch.bfloat16, *settings)
    wide = results(truth, inputs, torch.float32, *settings)
    exact = results(truth, inputs, torch.float64, *settings)
    for one, other, right in zip(ours, wide, exact, strict=True):
        assert error(one, right) < 2 * error(other.bfloat16(), right)


def test_lse_is_exact(path) -> None:
    lengths = (1, 40, 7)
    *inputs, _ = operands(lengths, (4, 2, 64))
    _, lse = packed_attention(*inputs, lengths, 0.3, 0)
    _, right = truth(*(tensor.double() for tensor in inputs), lengths, 0.3, 0)
    assert lse.dtype == torch.float32 and not lse.requires_grad
    torch.testing.assert_close(lse.double(), right, atol=2e-6, rtol=1e-6)


def test_large_scores_neither_overflow_nor_vanish(path) -> None:
    lengths, scale = (70, 5), 20.0
    inputs = operands(lengths, (2, 1, 64))
    assert all(
        x.isfinite().all()
        for x in results(packed_attention, inputs, torch.bfloat16, lengths, scale, 0)
    )
    y, _ = packed_attention(*inputs[:3], lengths, scale)
    right, _ = truth(*(tensor.double() for tensor in inputs[:3]), lengths, scale, 0)
    assert error(y, right) < 0.01


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(torch.float16, 3e-3), (torch.float32, 1e-6), (torch.float64, 1e-6)],
    ids=str,
)
def test_other_dtypes_and_widths_are_plain(dtype: torch.dtype, limit: float) -> None:
    lengths, heads = (5, 33), (4, 2, 24)
    inputs = operands(lengths, heads, dtype)
    assert not is_fused(*inputs[:3], 0.2)
    ours = results(packed_attention, inputs, dtype, lengths, 0.2, 7)
    exact = results(truth, inputs, torch.float64, lengths, 0.2, 7)
    for one, right in zip(ours, exact, strict=True):
        assert one.dtype == dtype and error(one, right) < limit


def test_a_negative_scale_is_plain() -> None:
    lengths, inputs = (40,), operands((40,), (2, 1, 64))
    assert not is_fused(*inputs[:3], -0.2)
    y, _ = packed_attention(*inputs[:3], lengths, -0.2)
    assert error(y, truth(*(t.double() for t in inputs[:3]), lengths, -0.2, 0)[0]) < 0.004


def test_only_what_needs_a_gradient_gets_one(path) -> None:
    q, k, v, dy = operands((9, 33), (2, 1, 64))
    y, _ = packed_attention(q, k, v.requires_grad_(), (9, 33), 0.2)
    y.backward(dy)
    assert v.grad is not None and q.grad is None and k.grad is None


@pytest.mark.parametrize("lengths", [(3, 4), (10, -2), (8, 0), ()], ids=str)
def test_lengths_that_do_not_fit(path, lengths) -> None:
    q, k, v, dy = operands((8,), (2, 1, 64))
    with pytest.raises(ValueError, match="8 rows"):
        packed_attention(q, k, v, lengths, 0.2)
    with pytest.raises(ValueError, match="8 rows"):
        packed_attention_backward(dy, q, k, v, torch.zeros(2, 8), lengths, 0.2, 0)


def test_shapes_that_do_not_fit() -> None:
    q, k, v, _ = operands((8,), (4, 2, 32))
    for wrong in ((q[:, :3], k, v), (q, k[:7], v), (q, k, v[..., :16]), (q[..., :16], k, v)):
        with pytest.raises(ValueError, match="do not fit"):
            packed_attention(*wrong, (8,), 0.2)
    with pytest.raises(ValueError, match="window"):
        packed_attention(q, k, v, (8,), 0.2, -1)


@pytest.mark.parametrize(("rows", "heads"), [(7, 4), (8, 3)])
def test_gradients_that_do_not_fit(path, rows: int, heads: int) -> None:
    q, k, v, dy = operands((8,), (4, 2, 32))
    lse = torch.zeros(4, 8)
    for wrong in ((dy[:rows, :heads], lse), (dy, lse[:heads, :rows])):
        with pytest.raises(ValueError, match="dy, q and lse"):
            packed_attention_backward(wrong[0], q, k, v, wrong[1], (8,), 0.2, 0)


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_op_contract(dtype: torch.dtype, window: int) -> None:
    q, k, v, dy = operands((5, 40), (2, 1, 64), dtype)
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    torch.library.opcheck(packed_attention, (*leaves, (5, 40), 0.2, window), atol=1e-2, rtol=1e-2)
    _, lse = packed_attention(q, k, v, (5, 40), 0.2, window)
    arguments = (dy, *(t.detach() for t in leaves), lse, (5, 40), 0.2, window)
    torch.library.opcheck(packed_attention_backward, arguments)
