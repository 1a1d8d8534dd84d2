"""Blocks of 32 rows: copies, arrangements, masks and sums against plain indexing, NaN around."""

import pytest
import torch
from samples import error
from torch import Tensor

from qtune_kernels.cpu import attention_tiles as parts
from qtune_kernels.cpu import tiles
from qtune_kernels.cpu.attention_schedule import NO_WINDOW
from qtune_kernels.cpu.jit import Integer, KernelCode, Pointer, kernel
from qtune_kernels.cpu.simd import F32

pytestmark = pytest.mark.skipif(not tiles.available(), reason="this processor has no AMX")


@kernel
def _stage(
    code: KernelCode,
    target: Pointer,
    start: Pointer,
    stride: Integer,
    height: Integer,
    *,
    width: int,
) -> None:
    parts.stage(code, parts.Rows(start, stride, height), target, width)


@kernel
def _arrange(code: KernelCode, target: Pointer, block: Pointer, *, name: str, width: int) -> None:
    getattr(parts, name)(code, block, target, width)


@kernel
def _score(
    code: KernelCode, scores: Pointer, rows: Pointer, others: Pointer, *, width: int
) -> None:
    tiles.configure(code)
    parts.score(code, rows, others, scores, width)
    tiles.release(code)


@kernel
def _add(code: KernelCode, sums: Pointer, left: Pointer, right: Pointer, fresh: Integer) -> None:
    tiles.configure(code)
    parts.open_sums(code, sums, fresh=fresh.equals(1))
    parts.multiply_add(code, left, tiles.ROW_BYTES, right, tiles.TILE_BYTES)
    tiles.move_sums(code, tiles.store, sums, parts.SCORES_ROW)
    tiles.release(code)


@kernel
def _hide(code: KernelCode, scores: Pointer, ahead: Integer, window: Integer) -> None:
    with code.when(parts.at_border(code, ahead, window)):
        parts.hide(code, scores, ahead, window)


@kernel
def _ranges(code: KernelCode, out: Pointer, block: Integer, window: Integer) -> None:
    code.store(parts.first_key_block(code, block, window), out)
    code.store(parts.query_blocks_end(block, window), out + 8)


@kernel
def _fold(code: KernelCode, out: Pointer, table: Pointer, count: Integer, *, name: str) -> None:
    combine = {"sum": lambda a, b: a + b, "max": code.largest}[name]
    for half, folded in enumerate(parts.fold(code, table, combine)):
        code.write(folded, out + 64 * half, F32, parts.live_lanes(code, count, half))


@kernel
def _write(
    code: KernelCode,
    out: Pointer,
    stride: Integer,
    height: Integer,
    block: Pointer,
    factors: Pointer,
    *,
    wide: bool,
) -> None:
    target = parts.Rows(out, stride, height)
    parts.write_rows(
        code, block, lambda row: parts.number(code, factors, row), target, 32, wide=wide
    )


@kernel
def _place(
    code: KernelCode,
    out: Pointer,
    start: Pointer,
    row_stride: Integer,
    head_stride: Integer,
    block: Integer,
    head: Integer,
) -> None:
    sample = parts.Sample(code, code.integer(5), code.integer(70))
    rows = sample.rows(parts.Matrix(start, row_stride, head_stride), block, head)
    code.store(code.load(rows.start, F32), out)
    code.store(rows.height, out + 8)


def block_of(width: int) -> Tensor:
    return torch.randn(32, width).bfloat16()


def arranged(name: str, block: Tensor) -> Tensor:
    """Tiles [T, 16, 32] bf16, as the kernels make them."""
    width = block.shape[1]
    found = torch.full((width // 16, 16, 32), torch.nan, dtype=torch.bfloat16)
    _arrange(found.data_ptr(), block.data_ptr(), name=name, width=width)
    return found


@pytest.mark.parametrize("width", [32, 96])
@pytest.mark.parametrize("height", [1, 31, 32])
def test_rows_beyond_the_sample_are_zero(height: int, width: int) -> None:
    around = torch.full((height + 2, width + 40), torch.nan, dtype=torch.bfloat16)
    rows = around[1:-1, 8 : 8 + width].copy_(torch.randn(height, width))
    target = torch.full((34, width), torch.nan, dtype=torch.bfloat16)
    _stage(target[1].data_ptr(), rows.data_ptr(), rows.stride(0) * 2, height, width=width)
    assert torch.equal(target[1 : 1 + height], rows)
    assert not target[1 + height : -1].any()
    assert target[0].isnan().all() and target[-1].isnan().all()


@pytest.mark.parametrize("width", [32, 96])
def test_arrangements_are_reshapes(width: int) -> None:
    block = block_of(width)
    # half, row, step, pair, one of two
    transposed = block.view(2, 16, width // 32, 16, 2).permute(0, 2, 3, 1, 4)
    # pair, one of two, tile, column
    paired = block.view(16, 2, width // 16, 16).permute(2, 0, 3, 1)
    columns = block.view(32, width // 16, 16).permute(1, 2, 0)
    assert torch.equal(arranged("transposed", block), transposed.reshape(-1, 16, 32))
    assert torch.equal(arranged("paired", block), paired.reshape(-1, 16, 32))
    assert torch.equal(arranged("columns", block), columns)


@pytest.mark.parametrize("width", [32, 96])
def test_scores_are_products_of_rows(width: int) -> None:
    rows, others = block_of(width), block_of(width)
    scores, right = torch.full((32, 32), torch.nan), arranged("transposed", others)
    _score(scores.data_ptr(), rows.data_ptr(), right.data_ptr(), width=width)
    assert error(scores, rows.double() @ others.double().T) < 1e-6


def test_sums_go_on_where_they_were_left() -> None:
    weights, values = block_of(32), block_of(32)
    right = arranged("paired", values)
    once, sums = weights.double() @ values.double(), torch.full((32, 32), torch.nan)
    for count, fresh in ((1, 1), (2, 0), (3, 0), (1, 1)):
        _add(sums.data_ptr(), weights.data_ptr(), right.data_ptr(), fresh)
        assert error(sums, count * once) < 1e-6


@pytest.mark.parametrize("window", [1, 5, 32, 33, 64, 80, NO_WINDOW])
@pytest.mark.parametrize("blocks", [0, 1, 2, 3])
def test_hidden_is_what_lies_ahead_or_too_far_back(blocks: int, window: int) -> None:
    scores = torch.randn(32, 32)
    query, key = 32 * blocks + torch.arange(32)[:, None], torch.arange(32)
    seen = (key <= query) & (query - key < window)
    right = torch.where(seen, scores, parts.HIDDEN)
    _hide(scores.data_ptr(), 32 * blocks, window)
    assert torch.equal(scores, right)


@pytest.mark.parametrize("window", [1, 2, 31, 32, 33, 34, 65, 100, NO_WINDOW])
def test_blocks_that_see_each_other(window: int) -> None:
    at, found = torch.arange(8 * 32), torch.empty(2, dtype=torch.int64)
    seen = (at <= at[:, None]) & (at[:, None] - at < window)
    blocks = seen.view(8, 32, 8, 32).any(3).any(1)
    for block in range(4):
        _ranges(found.data_ptr(), block, window)
        first, end = found.tolist()
        assert first == int(blocks[block].nonzero()[0])
        assert min(end, 8) == int(blocks[:, block].nonzero()[-1]) + 1


@pytest.mark.parametrize("name", ["sum", "max"])
@pytest.mark.parametrize("count", [0, 1, 16, 17, 32])
def test_lanes_are_folded_for_each_live_row(count: int, name: str) -> None:
    table, out = torch.randn(32, 16), torch.full((32,), torch.nan)
    _fold(out.data_ptr(), table.data_ptr(), count, name=name)
    right = table.double().sum(1) if name == "sum" else table.double().amax(1)
    torch.testing.assert_close(out[:count].double(), right[:count], rtol=0, atol=1e-5)
    assert out[count:].isnan().all()


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("height", [1, 31, 32])
def test_only_rows_of_the_sample_are_written(height: int, wide: bool) -> None:
    block, factors = torch.randn(32, 32), torch.randn(32)
    out = torch.full((34, 48), torch.nan, dtype=torch.float32 if wide else torch.bfloat16)
    rows = out[1 : 1 + height, 8:40]
    _write(
        rows.data_ptr(), 48 * out.itemsize, height, block.data_ptr(), factors.data_ptr(), wide=wide
    )
    assert torch.equal(rows, (block * factors[:, None])[:height].to(out.dtype))
    rows.fill_(torch.nan)
    assert out.isnan().all()


def test_a_block_lies_where_its_sample_and_head_say() -> None:
    # [T, heads] of numbers that tell where they are; the sample has rows 5 to 75
    matrix = torch.arange(80 * 3, dtype=torch.float32).view(80, 3)
    for block, head, height in ((0, 0, 32), (1, 2, 32), (2, 1, 6)):
        out = torch.empty(16)
        _place(out.data_ptr(), matrix.data_ptr(), 12, 4, block, head)
        assert out[0] == matrix[5 + 32 * block, head]
        assert int(out.view(torch.int64)[1]) == height
