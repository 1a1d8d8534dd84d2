"""The rotation compiled for sm_80 and sm_90: no spills, tensor cores used, tables in memory."""

import pytest
from machine_code import Compiler, MachineCode, Request

from qtune_kernels.hadamard_triton import constants, tile, warps

POINTERS = {name: "*bf16" for name in ("x_ptr", "y_ptr", "first_ptr", "second_ptr", "third_ptr")}
POINTERS |= {"signs_ptr": "*i8", "scale": "fp32"}
# bytes of shared memory that a program may have
SHARED = {80: 163 << 10, 90: 227 << 10}


def request(width: int, arch: int, transposed: bool = False) -> Request:
    plan = tile(width, modern=arch >= 90)
    assert plan is not None
    named = constants(plan, transposed)
    module = "qtune_kernels.hadamard_triton"
    return Request(module, "_hadamard_kernel", arch, named, POINTERS, warps(plan), 3, True)


CASES = {
    "rows side by side": request(576, 90),
    "three matrices": request(14336, 90),
    "the most sums": request(28672, 90, transposed=True),
    "a wide outermost matrix": request(11008, 90),
    "rows side by side, sm_80": request(576, 80),
    "a row each, sm_80": request(4864, 80),
}


@pytest.fixture(scope="module")
def compiled(compiler: Compiler) -> dict[str, MachineCode]:
    return compiler(CASES)


@pytest.mark.parametrize("case", CASES)
def test_registers_are_not_spilled(case: str, compiled: dict[str, MachineCode]) -> None:
    assert not compiled[case].spills


@pytest.mark.parametrize("case", CASES)
def test_tensor_cores_do_the_products(case: str, compiled: dict[str, MachineCode]) -> None:
    code = compiled[case]
    assert {"HMMA", "HGMMA"} & set(code.opcodes)
    assert code.shared_bytes <= SHARED[CASES[case].arch]
