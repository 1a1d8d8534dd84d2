"""The decoder of E8P compiled for sm_80 and sm_90: no spills, few instructions, wide stores."""

import pytest
from machine_code import Compiler, MachineCode, Request

from qtune_kernels.e8p_triton import WORDS

POINTERS = {"words_ptr": "*i16", "scale_ptr": "*fp32", "patterns_ptr": "*i32"}
WARPS, WARP, WEIGHTS_A_WORD = 4, 32, 8


def request(arch: int) -> Request:
    constants = {"STEP": 0.25, "WORDS": WORDS}
    pointers = POINTERS | {"weights_ptr": "*bf16"}
    module = "qtune_kernels.e8p_triton"
    return Request(module, "_dequantize_kernel", arch, constants, pointers, WARPS, 3, False)


@pytest.fixture(scope="module")
def compiled(compiler: Compiler) -> dict[int, MachineCode]:
    return compiler({arch: request(arch) for arch in (80, 90)})


@pytest.mark.parametrize("arch", [80, 90])
def test_registers_are_not_spilled(arch: int, compiled: dict[int, MachineCode]) -> None:
    assert not compiled[arch].spills


@pytest.mark.parametrize("arch", [80, 90])
def test_a_weight_costs_few_instructions(arch: int, compiled: dict[int, MachineCode]) -> None:
    # an H200 has time for about 15 at 2.25 bytes a weight
    code = compiled[arch]
    assert sum(code.opcodes.values()) * WARPS * WARP / (WORDS * WEIGHTS_A_WORD) < 12


@pytest.mark.parametrize("arch", [80, 90])
def test_a_thread_stores_a_whole_word_at_once(arch: int, compiled: dict[int, MachineCode]) -> None:
    assert compiled[arch].opcodes["STG"] == WORDS // (WARPS * WARP)
