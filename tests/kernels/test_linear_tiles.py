import pytest
import torch

from qtune_kernels.linear_tiles import (
    BACKWARD_TILES,
    FORWARD_TILES,
    MAX_PARTS,
    backward_tile,
    forward_tile,
    num_parts,
)

SHAPE = (4096, 4096)


@pytest.mark.parametrize("choose", [forward_tile, backward_tile])
def test_many_rows_are_left_to_the_vendors_gemm(choose) -> None:
    assert choose(256, SHAPE, torch.bfloat16, 64) is not None
    assert choose(257, SHAPE, torch.bfloat16, 64) is None
    assert choose(0, SHAPE, torch.bfloat16, 64) is None


@pytest.mark.parametrize("choose", [forward_tile, backward_tile])
@pytest.mark.parametrize(
    ("shape", "dtype", "group_size"),
    [
        ((4096, 576), torch.bfloat16, 64),
        (SHAPE, torch.float32, 64),
        (SHAPE, torch.bfloat16, 32),
    ],
    ids=["broken runs", "float32", "several groups in a plane"],
)
def test_what_the_kernels_cannot_read_is_dequantized(choose, shape, dtype, group_size) -> None:
    assert choose(1, shape, dtype, group_size) is None


@pytest.mark.parametrize("num_rows", [1, 2, 8, 9, 16, 17, 64, 65, 256])
def test_the_smallest_tile_that_holds_the_rows_serves(num_rows: int) -> None:
    tile = forward_tile(num_rows, SHAPE, torch.float16, 128)
    assert tile is not None
    assert tile.few_rows == (num_rows <= 16)
    # the kernel for few rows has one tile of rows only
    assert not tile.few_rows or tile.rows >= num_rows


def test_tables_are_in_order() -> None:
    for table in (FORWARD_TILES, BACKWARD_TILES):
        assert list(table) == sorted(table)


@pytest.mark.parametrize("num_programs", [1, 7, 64, 300, 5000])
@pytest.mark.parametrize("num_steps", [1, 2, 5, 32, 33, 448])
def test_parts_have_work_each(num_programs: int, num_steps: int) -> None:
    parts = num_parts(num_programs, num_steps)
    steps_a_part = -(-num_steps // parts)
    assert 1 <= parts <= MAX_PARTS
    assert (parts - 1) * steps_a_part < num_steps <= parts * steps_a_part
    assert parts == 1 or num_programs < 264
