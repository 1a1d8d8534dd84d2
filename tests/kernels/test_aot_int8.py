"""The kernels of INT8 activations compiled: integer tensor cores, no spills, few instructions."""

import pytest
from machine_code import Compiler, MachineCode, Request

from qtune_kernels.linear_int8_triton import TILES, Tile
from qtune_kernels.quantize_rows_triton import ROW_BLOCK

POINTERS = {
    "x_ptr": "*bf16",
    "codes_ptr": "*i8",
    "row_scales_ptr": "*fp32",
    "outliers_ptr": "*u8",
    "columns_ptr": "*i64",
    "num_outliers_ptr": "*i64",
    "packed_ptr": "*u8",
    "scale_codes_ptr": "*u8",
    "scale_scales_ptr": "*fp32",
    "scale_offset_ptr": "*fp32",
    "scale_map_ptr": "*fp32",
    "scales_ptr": "*fp32",
    "y_ptr": "*bf16",
}
WARP = 32


def product(tile: Tile, arch: int, group_size: int, step: int, **left_out: None) -> Request:
    constants = left_out | {
        "bias_ptr": None,
        "GROUP": group_size,
        # rows of 4096 weights
        "WHOLE_ROWS": group_size == 4096,
        "STEP": step,
        "BLOCK_M": tile.rows,
        "BLOCK_O": tile.features,
    }
    module, kernel = "qtune_kernels.linear_int8_triton", "_linear_int8_kernel"
    return Request(module, kernel, arch, constants, POINTERS, tile.warps, tile.stages, True)


def quantizer() -> Request:
    module, kernel = "qtune_kernels.quantize_rows_triton", "_quantize_rows_kernel"
    return Request(module, kernel, 90, {"BLOCK": ROW_BLOCK}, POINTERS, 4, 3, False)


CASES = {
    # without outliers, so that the longest loop is that over the weight
    "groups": product(TILES[128], 90, 64, 64, columns_ptr=None, num_outliers_ptr=None),
    "whole rows": product(TILES[256], 90, 4096, 128),
    "groups, sm_80": product(TILES[128], 80, 64, 64),
    "quantizer": quantizer(),
}


@pytest.fixture(scope="module")
def compiled(compiler: Compiler) -> dict[str, MachineCode]:
    return compiler(CASES)


@pytest.mark.parametrize("case", CASES)
def test_registers_are_not_spilled(case: str, compiled: dict[str, MachineCode]) -> None:
    assert not compiled[case].spills


def test_integers_are_multiplied_by_tensor_cores(compiled: dict[str, MachineCode]) -> None:
    # outlier columns meet in 16 bits
    assert {"IGMMA"} == {op for op in compiled["groups"].loop_opcodes if op.endswith("MMA")}
    assert {"IGMMA", "HGMMA"} <= set(compiled["whole rows"].opcodes)
    assert {"IMMA", "HMMA"} <= set(compiled["groups, sm_80"].opcodes)


def test_the_weight_goes_from_registers_to_the_tensor_core(
    compiled: dict[str, MachineCode],
) -> None:
    assert "STS" not in compiled["groups"].loop_opcodes


def test_a_product_costs_few_instructions(compiled: dict[str, MachineCode]) -> None:
    request, code = CASES["groups"], compiled["groups"]
    num_weights = request.constants["BLOCK_O"] * request.constants["STEP"]
    instructions = sum(code.loop_opcodes.values()) * request.warps * WARP / num_weights
    assert 4 < instructions <= 7.6


def test_a_row_is_quantized_with_few_instructions(compiled: dict[str, MachineCode]) -> None:
    instructions = sum(compiled["quantizer"].opcodes.values()) * 4 * WARP / ROW_BLOCK
    assert 5 < instructions <= 25
    # sixteen bytes at a time: two of 16-bit x and one of marks for sixteen columns, in both passes
    assert compiled["quantizer"].opcodes["LDG"] <= 16
