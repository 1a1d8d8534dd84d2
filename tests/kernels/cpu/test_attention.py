"""The attention kernels touch nothing outside, and their bits depend on nobody else's work."""

from collections.abc import Iterator

import pytest
import torch
from samples import error

from qtune_kernels import attention as plain
from qtune_kernels.cpu import attention as native
from qtune_kernels.cpu import tiles

pytestmark = pytest.mark.skipif(not tiles.available(), reason="this processor has no AMX")

GUARD = 64
LENGTHS = [(1,), (31, 33, 1, 100), (64, 32), (5,) * 9]
SCALE = 0.125


class Guarded:
    """Gives out memory full of NaN with marked bytes around it, and looks whether they are left."""

    def __init__(self) -> None:
        self.all: list[torch.Tensor] = []

    def bytes(self, count: int) -> torch.Tensor:
        self.all.append(torch.full((count + 2 * GUARD,), 0xFF, dtype=torch.uint8))
        return self.all[-1][GUARD:-GUARD]

    def new_empty(self, tensor: torch.Tensor, *shape, dtype: torch.dtype | None = None):
        shape, dtype = torch.Size(shape[0] if len(shape) == 1 else shape), dtype or tensor.dtype
        return self.bytes(shape.numel() * dtype.itemsize).view(dtype).view(shape)

    def are_left(self) -> bool:
        ends = [end for block in self.all for end in (block[:GUARD], block[-GUARD:])]
        return all(bool((end == 0xFF).all()) for end in ends)


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Guarded:
    """What the kernels write to."""
    memory = Guarded()
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda t, *a, **k: memory.new_empty(t, *a, **k))
    monkeypatch.setattr(native, "scratch", lambda role, count, dtype: memory.bytes(count))
    return memory


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def among_nan(rows: int, heads: int, width: int) -> torch.Tensor:
    """Random bf16 [T, heads, D] within a larger tensor of NaN."""
    around = torch.full((rows + 2, heads + 2, width + 24), torch.nan, dtype=torch.bfloat16)
    return around[1:-1, 1:-1, 8 : 8 + width].copy_(torch.randn(rows, heads, width))


def operands(lengths: tuple[int, ...], heads: int, key_heads: int, width: int) -> list:
    return [among_nan(sum(lengths), count, width) for count in (heads, key_heads, key_heads, heads)]


def run(q, k, v, dy, lengths: tuple[int, ...], window: int = 0) -> list[torch.Tensor]:
    """y, lse, dq, dk and dv."""
    y, lse = native.forward(q, k, v, lengths, SCALE, window)
    return [y, lse, *native.backward(dy, q, k, v, lse, lengths, SCALE, window)]


@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("width", [32, 96])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_nothing_outside_is_read_or_written(guarded, lengths, width, window) -> None:
    q, k, v, dy = operands(lengths, 4, 2, width)
    ours = run(q, k, v, dy, lengths, window)
    y, lse = plain._forward(q, k, v, lengths, SCALE, window)
    right = [y, lse, *plain._backward(dy, q, k, v, lse, lengths, SCALE, window)]
    assert guarded.are_left()
    for one, other in zip(ours, right, strict=True):
        assert one.is_contiguous()
        # a single query's score has no gradient
        assert (one - other).norm() <= 0.006 * other.norm() + 1e-6


@pytest.mark.parametrize("fewest", [0, 100], ids=["heads together", "heads apart"])
def test_bits_do_not_depend_on_threads(monkeypatch: pytest.MonkeyPatch, fewest: int) -> None:
    monkeypatch.setattr(native, "FEWEST_TASKS", fewest)
    inputs, lengths = operands((70, 3, 150, 64), 6, 2, 32), (70, 3, 150, 64)
    alone, again = run(*inputs, lengths), run(*inputs, lengths)
    torch.set_num_threads(3)
    shared = run(*inputs, lengths)
    for one, *others in zip(alone, again, shared, strict=True):
        assert all(torch.equal(one, other) for other in others)


def test_heads_apart_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, found = operands((70, 3), 6, 2, 32), []
    for fewest in (0, 100):
        monkeypatch.setattr(native, "FEWEST_TASKS", fewest)
        found.append(run(*inputs, (70, 3)))
    for one, other in zip(*found, strict=True):
        assert error(one, other.double()) < 2e-4


def test_bits_do_not_depend_on_the_other_samples() -> None:
    lengths = (70, 3, 150)
    inputs = operands(lengths, 2, 1, 32)
    y, lse, *gradients = run(*inputs, lengths)
    alone = run(*(tensor[70:73] for tensor in inputs), (3,))
    for one, other in zip([y, lse.T, *gradients], [alone[0], alone[1].T, *alone[2:]], strict=True):
        assert torch.equal(one[70:73], other)


def test_chunks_of_queries_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = operands((300,), 2, 1, 32)
    whole = run(*inputs, (300,))
    monkeypatch.setattr(native, "CHUNK_BYTES", 0)
    monkeypatch.setattr(native, "LEAST_CHUNK", 3)
    for one, other in zip(whole, run(*inputs, (300,)), strict=True):
        assert torch.equal(one, other)


def test_rows_whose_elements_lie_apart_are_copied() -> None:
    q, k, v, dy = (torch.randn(40, 2, 32).bfloat16() for _ in range(4))
    apart = [tensor.repeat_interleave(2, 2)[..., ::2] for tensor in (q, k, v, dy)]
    for one, other in zip(run(q, k, v, dy, (40,)), run(*apart, (40,)), strict=True):
        assert torch.equal(one, other)
