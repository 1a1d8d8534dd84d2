"""The kernel of scale gradients compiled for sm_80 and sm_90: no spills, tensor cores, one loop."""

import pytest
from machine_code import Compiler, MachineCode, Request

from qtune_kernels.scale_gradient_triton import BLOCK_I, BLOCK_O, BLOCK_T, STAGES, WARPS

MODULE = "qtune_kernels.scale_gradient_triton"
POINTERS = {
    "dy_ptr": "*bf16",
    "x_ptr": "*bf16",
    "packed_ptr": "*u8",
    "levels_ptr": "*fp32",
    "level_units_ptr": "*fp32",
    "weight_units_ptr": "*fp32",
}
# bytes that a program may have on cards of sm_86 to sm_120, and on an H200
MOST_SHARED = {80: 101376, 90: 232448}


def request(bits: int, unit: int = 64, arch: int = 90) -> Request:
    constants = {"BITS": bits, "UNIT": unit}
    constants |= {"BLOCK_O": BLOCK_O, "BLOCK_I": BLOCK_I, "BLOCK_T": BLOCK_T}
    constants |= {"levels_ptr": None} if bits == 8 else {}
    return Request(MODULE, "_scale_gradient_kernel", arch, constants, POINTERS, WARPS, STAGES, True)


CASES = {
    "4 bits": request(4),
    "4 bits, sm_80": request(4, arch=80),
    "3 bits": request(3),
    "2 bits, groups of 16": request(2, 16),
    "8 bits": request(8),
}


@pytest.fixture(scope="module")
def compiled(compiler: Compiler) -> dict[str, MachineCode]:
    return compiler(CASES)


@pytest.mark.parametrize("case", CASES)
def test_registers_are_not_spilled(case: str, compiled: dict[str, MachineCode]) -> None:
    assert not compiled[case].spills


@pytest.mark.parametrize("case", CASES)
def test_shared_memory_suffices(case: str, compiled: dict[str, MachineCode]) -> None:
    assert compiled[case].shared_bytes <= MOST_SHARED[CASES[case].arch]


@pytest.mark.parametrize("case", CASES)
def test_the_loop_is_a_product_and_reads_no_codes(
    case: str, compiled: dict[str, MachineCode]
) -> None:
    opcodes = compiled[case].loop_opcodes
    assert {"HMMA", "HGMMA"} & set(opcodes)
    # codes and levels are plain loads; dy and x come by asynchronous copies
    assert "LDG" not in opcodes
