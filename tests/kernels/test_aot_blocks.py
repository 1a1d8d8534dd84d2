"""Norm, gated activation and RoPE compiled for sm_90: no spills, few instructions an element.

All are bound by memory: at 4 to 10 bytes an element an H200 has time for 27 to 69 instructions.
"""

from typing import Any

import pytest
from machine_code import Compiler, MachineCode, Request

POINTERS = {
    name: "*bf16"
    for name in (
        *("x_ptr", "weight_ptr", "dy_ptr", "added_ptr", "dx_ptr"),
        *("dh_ptr", "gate_ptr", "up_ptr", "dgate_ptr", "dup_ptr"),
        *("q_ptr", "k_ptr", "cos_ptr", "sin_ptr", "turned_q_ptr", "turned_k_ptr"),
    )
}
WARP = 32


def request(kernel: str, warps: int, **constants: Any) -> Request:
    module = {"_rms": "norm", "_gat": "swiglu", "_rop": "rope"}[kernel[:4]]
    return Request(
        f"qtune_kernels.{module}_triton", kernel, 90, constants, POINTERS, warps, 3, True
    )


NORM = {"EPS": 1e-5, "OFFSET": 1.0, "ROWS": 1, "COLUMNS": 4096}
ROPE = {"INVERSE": True, "HALF": 64, "SIZE": 128, "HALF_BLOCK": 64, "REST_BLOCK": 0}
# name -> request, elements that a program writes, instructions for each
CASES: dict[str, tuple[Request, int, float]] = {
    "norm dx of heads": (
        request("_rms_norm_dx_kernel", 8, **NORM | {"ROWS": 16, "COLUMNS": 128}),
        16 * 128,
        30,
    ),
    "gelu backward": (request("_gated_backward_kernel", 4, GELU=True, BLOCK=1024), 1024, 46),
    "rope": (request("_rope_kernel", 4, HEADS=32, KEY_HEADS=8, **ROPE), 40 * 128, 11.5),
}


@pytest.fixture(scope="module")
def compiled(compiler: Compiler) -> dict[str, MachineCode]:
    return compiler({name: request for name, (request, _, _) in CASES.items()})


@pytest.mark.parametrize("case", CASES)
def test_registers_are_not_spilled(case: str, compiled: dict[str, MachineCode]) -> None:
    assert not compiled[case].spills


@pytest.mark.parametrize("case", CASES)
def test_an_element_costs_few_instructions(case: str, compiled: dict[str, MachineCode]) -> None:
    request, num_elements, budget = CASES[case]
    instructions = sum(compiled[case].opcodes.values()) * request.warps * WARP / num_elements
    assert budget / 2 < instructions <= budget


def test_memory_is_read_16_bytes_at_a_time(compiled: dict[str, MachineCode]) -> None:
    # 8 of the 1024 elements of each of three operands a thread
    assert compiled["gelu backward"].opcodes["LDG"] == 3
    assert compiled["gelu backward"].opcodes["STG"] == 2
