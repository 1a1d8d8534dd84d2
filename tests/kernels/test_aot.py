"""Kernels compiled for sm_80 and sm_90: no spills, tensor cores in use, cheap look-ups.

An instruction budget caught more than once what no test of results can: a table that the compiler
had moved into asynchronous copies, or a left operand that it took apart and put together again.
"""

import shutil

import pytest
import torch
from machine_code import MachineCode, Request, compile_all, count_opcodes, longest_loop
from samples import NF4

from qtune_kernels.dequantize_triton import PROGRAM_WEIGHTS
from qtune_kernels.linear_tiles import BACKWARD_TILES, FORWARD_TILES, Tile
from qtune_kernels.lookup import lookup_ptx
from qtune_kernels.packing import RUN

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
WARP = 32


def product(kernel: str, tile: Tile, arch: int, **ones: int) -> Request:
    # a launch makes every argument that is 1 a compile-time constant: `ones`
    constants = ones | {
        "bias_ptr": None,
        "LOOKUP": lookup_ptx(NF4, torch.bfloat16),
        "GROUP": 64,
        "BLOCK_M": tile.rows,
        "BLOCK_O": tile.features,
    }
    module = "qtune_kernels.linear_triton"
    return Request(module, kernel, arch, constants, POINTERS, tile.warps, tile.stages, True)


def dequantizer(bits: int) -> Request:
    constants = {"GROUP": 64, "UNIT": 64, "UNITS": PROGRAM_WEIGHTS * bits // 8 // 64}
    module, kernel = "qtune_kernels.dequantize_triton", f"_dequantize_{bits}bit_kernel"
    return Request(module, kernel, 90, constants, POINTERS, 4, 3, False)


# name -> request, weights in one pass of the loop (dequantize: in a program), instructions a weight
CASES: dict[str, tuple[Request, int, float | None]] = {
    "dequantize 4 bits": (dequantizer(4), PROGRAM_WEIGHTS, 10.5),
    "dequantize 8 bits": (dequantizer(8), PROGRAM_WEIGHTS, 10.5),
    "8 rows": (product("_few_rows_kernel", FORWARD_TILES[8], 90), 64 * RUN, 5.8),
    "1 row, sm_80": (product("_few_rows_kernel", FORWARD_TILES[8], 80, num_rows=1), 64 * RUN, None),
    "256 rows": (product("_many_rows_kernel", FORWARD_TILES[256], 90), 128 * RUN, 8.0),
    "256 rows, sm_80": (product("_many_rows_kernel", FORWARD_TILES[256], 80), 128 * RUN, None),
    "dx, 256 rows": (product("_dx_kernel", BACKWARD_TILES[256], 90), 128 * RUN, 8.1),
    "dx, 256 rows, sm_80": (product("_dx_kernel", BACKWARD_TILES[256], 80), 128 * RUN, None),
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, MachineCode]:
    requests = [request for request, _, _ in CASES.values()]
    codes = compile_all(requests, tmp_path_factory.mktemp("triton"))
    return dict(zip(CASES, codes, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_registers_are_not_spilled(case: str, compiled: dict[str, MachineCode]) -> None:
    code = compiled[case]
    assert (code.stack_bytes, code.local_bytes) == (0, 0)
    assert not {"LDL", "STL"} & set(code.opcodes)


@pytest.mark.parametrize("case", [case for case in CASES if "dequantize" not in case])
def test_products_use_tensor_cores(case: str, compiled: dict[str, MachineCode]) -> None:
    assert {"HMMA", "HGMMA"} & set(compiled[case].loop_opcodes)


@pytest.mark.parametrize("case", [case for case, (_, _, budget) in CASES.items() if budget])
def test_a_weight_costs_few_instructions(case: str, compiled: dict[str, MachineCode]) -> None:
    request, num_weights, budget = CASES[case]
    code = compiled[case]
    opcodes = code.opcodes if "dequantize" in case else code.loop_opcodes
    instructions = sum(opcodes.values()) * request.warps * WARP / num_weights
    # far fewer would mean that the loop was not found
    assert budget is not None and budget / 2 < instructions <= budget


def test_the_look_up_reads_no_memory(compiled: dict[str, MachineCode]) -> None:
    # the weight, two tiles of x and the scales; a table in memory would add a copy for each weight
    assert compiled["256 rows"].loop_opcodes["LDGSTS"] <= 24


def test_loops_and_opcodes_are_found_in_a_listing() -> None:
    listing = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/               @P0 IADD3.X R2, R2, 0x1, RZ ;
.L_x_2:
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0030*/              @!P1 BRA `(.L_x_2) ;
        /*0040*/                   BRA `(.L_x_1) ;
        /*0050*/                   EXIT ;
""".splitlines()
    assert count_opcodes(listing) == {"MOV": 1, "IADD3": 1, "HMMA": 1, "BRA": 2, "EXIT": 1}
    assert count_opcodes(longest_loop(listing)) == {"IADD3": 1, "HMMA": 1, "BRA": 2}
    assert longest_loop(listing[:3]) == []


def test_a_kernel_that_does_not_compile_is_an_error(tmp_path) -> None:
    with pytest.raises(RuntimeError, match="no_such_kernel"):
        compile_all([product("no_such_kernel", FORWARD_TILES[8], 90)], tmp_path)
    shutil.rmtree(tmp_path)
