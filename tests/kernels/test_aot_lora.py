"""The kernels with an adapter, and dequantizing with gaps behind rows, compiled for sm_90."""

import pytest
import torch
from machine_code import Compiler, MachineCode, Request
from samples import NF4

from qtune_kernels.dequantize_triton import PROGRAM_WEIGHTS
from qtune_kernels.linear_tiles import Tile, backward_tile, forward_tile
from qtune_kernels.lookup import lookup_ptx

POINTERS = {
    "x_ptr": "*bf16",
    "dy_ptr": "*bf16",
    "packed_ptr": "*u8",
    "scale_codes_ptr": "*u8",
    "scale_scales_ptr": "*fp32",
    "scale_offset_ptr": "*fp32",
    "scale_map_ptr": "*fp32",
    "levels_ptr": "*fp32",
    "weights_ptr": "*bf16",
    "sums_ptr": "*fp32",
}
ADAPTER = {"narrow_ptr": "*bf16", "matrix_ptr": "*fp32", "scaling": "fp32"}
SHAPE = (4096, 4096)
RANK = 16
NUM_ROWS = 256


def product(kernel: str, tile: Tile | None) -> Request:
    assert tile is not None
    constants = {
        "bias_ptr": None,
        "zeros_ptr": None,
        "LOOKUP": lookup_ptx(NF4, torch.bfloat16),
        "BITS": 4,
        "SEGMENTS": 2,
        "STRIPS": 1,
        "GROUP": 64,
        "BLOCK_M": tile.rows,
        "BLOCK_O": tile.features,
        "RANK": RANK,
    }
    module = "qtune_kernels.linear_triton"
    pointers = POINTERS | ADAPTER
    return Request(module, kernel, 90, constants, pointers, tile.warps, tile.stages, True)


def dequantizer() -> Request:
    constants = {"BITS": 4, "SEGMENTS": 2, "GROUP": 64, "UNIT": 64, "UNITS": PROGRAM_WEIGHTS // 128}
    constants |= {"zeros_ptr": None, "FIRST": None}
    pointers = POINTERS | {"units_a_row": "i32", "gaps": "i32"}
    module, kernel = "qtune_kernels.dequantize_triton", "_dequantize_levels_kernel"
    return Request(module, kernel, 90, constants, pointers, 4, 3, False)


def request_of(name: str) -> Request:
    if name == "dequantize":
        return dequantizer()
    if name == "forward":
        tile = forward_tile(NUM_ROWS, SHAPE, torch.bfloat16, 64, 4)
        return product("_many_rows_kernel", tile)
    tile = backward_tile(NUM_ROWS, SHAPE, torch.bfloat16, 64, 4)
    return product("_dx_kernel", tile)


# instructions a weight, as without adapter or gaps; gaps cost three more
BUDGETS = {"forward": 8.0, "backward": 8.1, "dequantize": 13.0}
PRODUCTS = ["forward", "backward"]


@pytest.fixture(scope="module")
def compiled(compiler: Compiler) -> dict[str, MachineCode]:
    return compiler({name: request_of(name) for name in BUDGETS})


@pytest.mark.parametrize("name", BUDGETS)
def test_registers_are_not_spilled(name: str, compiled: dict[str, MachineCode]) -> None:
    assert not compiled[name].spills


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_adapter_is_multiplied_on_tensor_cores(name: str, compiled) -> None:
    code = compiled[name]
    outside = code.opcodes["HGMMA"] - code.loop_opcodes["HGMMA"]
    # one more step of 16 columns: one product forward, one for each of two segments backward
    assert outside >= PRODUCTS.index(name) + 1


@pytest.mark.parametrize("name", BUDGETS)
def test_a_weight_costs_few_instructions(name: str, compiled: dict[str, MachineCode]) -> None:
    request, code = request_of(name), compiled[name]
    opcodes = code.opcodes if name == "dequantize" else code.loop_opcodes
    num_weights = PROGRAM_WEIGHTS if name == "dequantize" else request.constants["BLOCK_O"] * 128
    instructions = sum(opcodes.values()) * request.warps * 32 / num_weights
    assert BUDGETS[name] / 2 < instructions <= BUDGETS[name]


def test_gaps_leave_the_stores_wide(compiled: dict[str, MachineCode]) -> None:
    # 128 weights of each thread, eight at a time
    assert compiled["dequantize"].opcodes["STG"] == PROGRAM_WEIGHTS // 128 // 8
