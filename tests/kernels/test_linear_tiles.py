import pytest
import torch

from qtune_kernels.linear_tiles import backward_tile, forward_tile, most_fused_rows, num_parts
from qtune_kernels.packing import SEGMENT, TILE_SEGMENTS
from qtune_kernels.tile_tables import WIDTHS, table_of

SHAPE = (4096, 4096)


@pytest.mark.parametrize("choose", [forward_tile, backward_tile])
@pytest.mark.parametrize("bits", WIDTHS)
def test_many_rows_are_left_to_the_vendors_gemm(choose, bits: int) -> None:
    assert choose(1, SHAPE, torch.bfloat16, 64, bits) is not None
    assert choose(1 << 20, SHAPE, torch.bfloat16, 64, bits) is None
    assert choose(0, SHAPE, torch.bfloat16, 64, bits) is None


@pytest.mark.parametrize("choose", [forward_tile, backward_tile])
@pytest.mark.parametrize(
    ("shape", "dtype", "group_size"),
    [
        ((4096, 576), torch.bfloat16, 64),
        (SHAPE, torch.float32, 64),
        (SHAPE, torch.bfloat16, 32),
    ],
    ids=["broken tiles", "float32", "several groups in a plane"],
)
def test_what_the_kernels_cannot_read_is_dequantized(choose, shape, dtype, group_size) -> None:
    assert choose(1, shape, dtype, group_size, 4) is None


@pytest.mark.parametrize("bits", WIDTHS)
def test_rows_are_whole_tiles(bits: int) -> None:
    width = 3 * SEGMENT * TILE_SEGMENTS[bits]
    assert forward_tile(1, (64, width), torch.float16, 64, bits) is not None
    assert forward_tile(1, (64, width + SEGMENT), torch.float16, 64, bits) is None


@pytest.mark.parametrize("num_rows", [1, 2, 8, 9, 16, 17, 64, 65, 256])
def test_the_tile_holds_the_rows(num_rows: int) -> None:
    tile = forward_tile(num_rows, SHAPE, torch.float16, 128, 4, torch.device("cpu"))
    assert tile is not None
    assert tile.few_rows == (num_rows <= 16)
    # the kernel for few rows has one tile of rows only
    assert not tile.few_rows or tile.rows >= num_rows


@pytest.mark.parametrize("bits", WIDTHS)
def test_no_more_rows_are_fused_than_it_says(bits: int) -> None:
    most = most_fused_rows(torch.device("cpu"))
    assert forward_tile(most, SHAPE, torch.bfloat16, 64, bits) is not None
    assert forward_tile(most + 1, SHAPE, torch.bfloat16, 64, bits) is None


@pytest.mark.parametrize("num_programs", [1, 7, 64, 300, 5000])
@pytest.mark.parametrize("num_steps", [1, 2, 5, 32, 33, 448])
def test_parts_have_work_each(num_programs: int, num_steps: int) -> None:
    parts = num_parts(num_programs, num_steps)
    steps_a_part = -(-num_steps // parts)
    assert 1 <= parts <= table_of().max_parts
    assert (parts - 1) * steps_a_part < num_steps <= parts * steps_a_part
    assert parts == 1 or num_programs < table_of().programs
