"""Other levels than NF4's, and zero points, and quantizing, compiled for sm_90."""

from typing import Any

import pytest
import torch
from machine_code import Compiler, MachineCode, Request
from samples import COUNTED, THREE_BITS, TWO_BITS

from qtune_kernels import dequantize_triton
from qtune_kernels.lookup import decoder
from qtune_kernels.packing import SEGMENT, STRIP_SEGMENTS, TILE_SEGMENTS, code_bits
from qtune_kernels.quantize_triton import PROGRAM_WEIGHTS

SCALES = {"scale_codes_ptr": "*u8", "scale_offset_ptr": "*fp32", "scale_map_ptr": "*fp32"}
SCALES |= {"scale_scales_ptr": "*fp32", "packed_ptr": "*u8"}
TABLES = {"bounds_ptr": "*fp32", "steps_ptr": "*i32", "scales_ptr": "*fp32", "packed_ptr": "*u8"}
INT4 = tuple((code - 8) / 7 for code in range(16))
FEATURES = 64
WARP = 32


def few_rows(levels: tuple[float, ...], stages: int, zeros: str | None = None) -> Request:
    bits = code_bits(levels)
    text, unit, base = decoder(levels, torch.bfloat16, zeros is not None)
    constants = {
        "bias_ptr": None,
        "LOOKUP": text,
        "UNIT": unit,
        "BASE": base,
        "BITS": bits,
        "SEGMENTS": STRIP_SEGMENTS[bits],
        "STRIPS": TILE_SEGMENTS[bits] // STRIP_SEGMENTS[bits],
        "GROUP": 64,
        "BLOCK_M": 8,
        "BLOCK_O": FEATURES,
    }
    pointers = SCALES | {"x_ptr": "*bf16", "sums_ptr": "*fp32"}
    constants, pointers = with_zeros(constants, pointers, zeros)
    module = "qtune_kernels.linear_triton"
    return Request(module, "_few_rows_kernel", 90, constants, pointers, 2, stages, True)


def with_zeros(
    constants: dict[str, Any], pointers: dict[str, str], zeros: str | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Both with zero points of that type, and scales as they go with them."""
    if zeros is None:
        return constants | {"zeros_ptr": None}, pointers
    return constants, pointers | {"zeros_ptr": zeros, "scale_codes_ptr": "*i8"}


def dequantizer(zeros: str | None) -> Request:
    constants = {"BITS": 4, "SEGMENTS": 2, "GROUP": 64, "UNIT": 64, "FIRST": 0.0}
    constants |= {"UNITS": dequantize_triton.PROGRAM_WEIGHTS // 2 // SEGMENT}
    pointers = SCALES | {"levels_ptr": "*fp32", "weights_ptr": "*bf16"}
    constants, pointers = with_zeros(constants, pointers, zeros)
    module = "qtune_kernels.dequantize_triton"
    return Request(module, "_dequantize_levels_kernel", 90, constants, pointers, 4, 3, False)


def encoder() -> Request:
    units = PROGRAM_WEIGHTS // 2 // SEGMENT
    constants = {"BITS": 4, "SEGMENTS": 2, "GROUP": 64, "UNIT": 64, "UNITS": units}
    constants |= {"zeros_ptr": None}
    pointers = TABLES | {"weight_ptr": "*bf16"}
    module = "qtune_kernels.quantize_triton"
    return Request(module, "_encode_levels_kernel", 90, constants, pointers, 4, 3, False)


WHOLE, FLOAT = "*u8", "*fp32"
# name -> request, weights in one pass of the loop (others: in a program), instructions a weight
CASES = {
    "8 rows, INT4, zeros": (few_rows(COUNTED["int4"], 4, WHOLE), FEATURES * 128, 3.0),
    "8 rows, INT4, float zeros": (few_rows(COUNTED["int4"], 4, FLOAT), FEATURES * 128, 3.8),
    "8 rows, INT3, zeros": (few_rows(COUNTED["int3"], 3, WHOLE), FEATURES * 512, 3.4),
    "8 rows, INT2, zeros": (few_rows(COUNTED["int2"], 4, WHOLE), FEATURES * 256, 3.0),
    "dequantize INT4": (dequantizer(None), dequantize_triton.PROGRAM_WEIGHTS, 7.7),
    "dequantize INT4, zeros": (dequantizer(WHOLE), dequantize_triton.PROGRAM_WEIGHTS, 8.8),
    "8 rows, INT4": (few_rows(INT4, 4), FEATURES * SEGMENT * TILE_SEGMENTS[4], 3.0),
    "8 rows, 2 bits": (few_rows(TWO_BITS, 4), FEATURES * SEGMENT * TILE_SEGMENTS[2], 3.2),
    "8 rows, 3 bits": (few_rows(THREE_BITS, 3), FEATURES * SEGMENT * TILE_SEGMENTS[3], 3.7),
    "encode 4 bits": (encoder(), PROGRAM_WEIGHTS, 54),
}
FEW_ROWS = [case for case in CASES if "rows" in case]


@pytest.fixture(scope="module")
def compiled(compiler: Compiler) -> dict[str, MachineCode]:
    return compiler({name: request for name, (request, _, _) in CASES.items()})


@pytest.mark.parametrize("case", CASES)
def test_registers_are_not_spilled(case: str, compiled: dict[str, MachineCode]) -> None:
    assert not compiled[case].spills


@pytest.mark.parametrize("case", CASES)
def test_a_weight_costs_few_instructions(case: str, compiled: dict[str, MachineCode]) -> None:
    request, num_weights, budget = CASES[case]
    opcodes = compiled[case].loop_opcodes if case in FEW_ROWS else compiled[case].opcodes
    instructions = sum(opcodes.values()) * request.warps * WARP / num_weights
    # far fewer would mean that the loop was not found
    assert budget / 2 < instructions <= budget


@pytest.mark.parametrize("case", FEW_ROWS)
def test_weights_are_decoded_where_tensor_cores_want_them(
    case: str, compiled: dict[str, MachineCode]
) -> None:
    opcodes = compiled[case].loop_opcodes
    assert "HMMA" in opcodes
    # levels that went through shared memory would be stored there, 16 bytes a time; scales and zero
    # points of up to eight segments may
    assert opcodes.get("STS", 0) <= 16
