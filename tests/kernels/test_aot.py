"""Kernels compiled for sm_80 and sm_90: no spills, tensor cores in use, cheap look-ups.

Of every table each tile is compiled at one width, and for each kernel and width the largest tile,
which asks for the most registers and shared memory. An instruction budget caught more than once
what no test of results can: a table that the compiler had moved into asynchronous copies, or a left
operand that it took apart and put together again.
"""

import pytest
import torch
from machine_code import Compiler, MachineCode, Request, count_opcodes, longest_loop
from samples import NF4, THREE_BITS

from qtune_kernels.dequantize_triton import PROGRAM_WEIGHTS
from qtune_kernels.lookup import lookup_ptx
from qtune_kernels.packing import SEGMENT, STRIP_SEGMENTS, TILE_SEGMENTS
from qtune_kernels.tile_tables import FOLDER, Tile, read_all

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
LEVELS = {4: NF4, 3: THREE_BITS, 2: NF4[::5]}
WARP = 32
FEW = Tile(8, 64, warps=2, stages=4, few_rows=True)
MANY = Tile(128, 128, warps=8, stages=2)
BACK = Tile(128, 128, warps=8, stages=2)
NARROW = Tile(64, 64, warps=4, stages=3)
# bytes that a program may have: on GeForce cards of sm_86 to sm_120, which the default serves
# too and which compile as sm_80 does here, and on an H200
MOST_SHARED = {80: 101376, 90: 232448}


def kernel_of(kind: str, tile: Tile) -> str:
    if kind == "backward":
        return "_dx_kernel"
    return "_few_rows_kernel" if tile.few_rows else "_many_rows_kernel"


def product(kernel: str, tile: Tile, arch: int = 90, bits: int = 4, **ones: int) -> Request:
    # a launch makes every argument that is 1 a compile-time constant: `ones`
    constants = ones | {
        "bias_ptr": None,
        "zeros_ptr": None,
        "LOOKUP": "" if bits == 8 else lookup_ptx(LEVELS[bits], torch.bfloat16),
        "BITS": bits,
        "SEGMENTS": STRIP_SEGMENTS[bits],
        "STRIPS": TILE_SEGMENTS[bits] // STRIP_SEGMENTS[bits],
        "GROUP": 64,
        "BLOCK_M": tile.rows,
        "BLOCK_O": tile.features,
    }
    module = "qtune_kernels.linear_triton"
    return Request(module, kernel, arch, constants, POINTERS, tile.warps, tile.stages, True)


def dequantizer(bits: int) -> Request:
    if bits == 8:
        kernel, constants = "_dequantize_8bit_kernel", {"UNITS": PROGRAM_WEIGHTS // SEGMENT}
    else:
        segments = STRIP_SEGMENTS[bits]
        units = PROGRAM_WEIGHTS // segments // SEGMENT
        kernel = "_dequantize_levels_kernel"
        constants = {"BITS": bits, "SEGMENTS": segments, "UNITS": units, "FIRST": None}
    constants |= {"GROUP": 64, "UNIT": 64, "zeros_ptr": None}
    return Request("qtune_kernels.dequantize_triton", kernel, 90, constants, POINTERS, 4, 3, False)


def tables() -> dict[str, Request]:
    """Requests for the tiles of all tables, by what they are for."""
    made: dict[str, Request] = {}
    for table in read_all(FOLDER).values():
        entries = [entry for entry in table.entries if entry.tile is not None]
        uses = {
            (kernel_of(entry.kind, entry.tile), entry.tile, bits)
            for entry in entries
            for bits in entry.bits
        }
        for kernel, tile, bits in uses:
            rivals = [other for name, other, width in uses if (name, width) == (kernel, bits)]
            widths = [width for name, other, width in uses if (name, other) == (kernel, tile)]
            first = bits == (4 if 4 in widths else min(widths))
            if first or tile == max(rivals, key=lambda it: it.rows * it.features * it.stages):
                made[f"{kernel} {tuple(tile)}, {bits} bits"] = product(kernel, tile, bits=bits)
    return dict(sorted(made.items()))


# name -> request, weights in one pass of the loop (dequantize: in a program), instructions a weight
CASES: dict[str, tuple[Request, int, float | None]] = {
    "dequantize 4 bits": (dequantizer(4), PROGRAM_WEIGHTS, 10.5),
    "dequantize 8 bits": (dequantizer(8), PROGRAM_WEIGHTS, 10.5),
    "8 rows": (product("_few_rows_kernel", FEW), 64 * 128, 5.8),
    "1 row, sm_80": (product("_few_rows_kernel", FEW, 80, num_rows=1), 64 * 128, None),
    "256 rows": (product("_many_rows_kernel", MANY), 128 * 128, 8.0),
    "256 rows, sm_80": (product("_many_rows_kernel", MANY, 80), 128 * 128, None),
    "256 rows, 3 bits, sm_80": (product("_many_rows_kernel", NARROW, 80, 3), 64 * 256, None),
    "dx, 256 rows": (product("_dx_kernel", BACK), 128 * 128, 8.1),
    "dx, 256 rows, sm_80": (product("_dx_kernel", BACK, 80), 128 * 128, None),
}
# what has a budget above is not compiled again
CASES |= {
    name: (request, 0, None)
    for name, request in tables().items()
    if request not in [other for other, _, _ in CASES.values()]
}


@pytest.fixture(scope="module")
def compiled(compiler: Compiler) -> dict[str, MachineCode]:
    return compiler({name: request for name, (request, _, _) in CASES.items()})


@pytest.mark.parametrize("case", CASES)
def test_registers_are_not_spilled(case: str, compiled: dict[str, MachineCode]) -> None:
    assert not compiled[case].spills


@pytest.mark.parametrize("case", CASES)
def test_shared_memory_suffices(case: str, compiled: dict[str, MachineCode]) -> None:
    assert compiled[case].shared_bytes <= MOST_SHARED[CASES[case][0].arch]


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


def test_a_kernel_that_does_not_compile_is_an_error(compiler: Compiler) -> None:
    with pytest.raises(AttributeError, match="no_such_kernel"):
        compiler({"missing": product("no_such_kernel", FEW)})
