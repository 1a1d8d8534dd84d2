"""The softmax kernel compiled for sm_90: no spills, wide loads, few instructions a logit."""

import pytest
from machine_code import Compiler, MachineCode, Request

from qtune_kernels.softmax_gradient_triton import BLOCK, WARPS

MODULE = "qtune_kernels.softmax_gradient_triton"
POINTERS = {"logits_ptr": "*bf16", "targets_ptr": "*i64", "losses_ptr": "*fp32"}


def request(softcap: float | None) -> Request:
    constants = {"SOFTCAP": softcap, "SCALE": 1.0, "GRADIENT": True, "BLOCK": BLOCK}
    return Request(MODULE, "_softmax_kernel", 90, constants, POINTERS, WARPS, 3, True)


# name -> request, instructions a logit in the first pass, the longer one
CASES = {"plain": (request(None), 12.5), "soft-capped": (request(30.0), 22.0)}


@pytest.fixture(scope="module")
def compiled(compiler: Compiler) -> dict[str, MachineCode]:
    return compiler({name: request for name, (request, _) in CASES.items()})


@pytest.mark.parametrize("case", CASES)
def test_registers_are_not_spilled(case: str, compiled: dict[str, MachineCode]) -> None:
    assert not compiled[case].spills


@pytest.mark.parametrize("case", CASES)
def test_a_logit_costs_few_instructions(case: str, compiled: dict[str, MachineCode]) -> None:
    budget = CASES[case][1]
    instructions = sum(compiled[case].loop_opcodes.values()) * WARPS * 32 / BLOCK
    # far fewer would mean that the loop was not found
    assert budget / 2 < instructions <= budget


@pytest.mark.parametrize("case", CASES)
def test_neighbouring_logits_are_read_and_written_together(case, compiled) -> None:
    # sixteen bytes at a time; the loss is written beside the gradient
    at_once = BLOCK // (WARPS * 32) * 2 // 16
    assert compiled[case].loop_opcodes["LDG"] == at_once
    assert compiled[case].opcodes["STG"] == at_once + 1
