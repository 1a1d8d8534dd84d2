"""The matrix kernel's machine code: a step is eight instructions on tiles, and nothing is spilled.

Its results are tested in test_product.py, which calls it as the ops do.
"""

import re

import pytest
import torch

from qtune_kernels.cpu import jit, tiles
from qtune_kernels.cpu.gemm import multiply
from qtune_kernels.cpu.groups import Layout

pytestmark = pytest.mark.skipif(not tiles.available(), reason="no AMX")

CASE = {
    "kind": "codes",
    "layout": Layout(4, 64, torch.uint8, None),
    "extended": True,
    "biased": False,
    "wide": False,
    "accumulate": False,
    "by_rows": True,
}


@pytest.fixture(scope="module", params=[True, False], ids=["forward", "backward"])
def assembly(request: pytest.FixtureRequest) -> str:
    return jit.assembly(multiply.text(outputs_first=request.param, **CASE))


def test_the_loop_over_a_sum_does_nothing_but_load_and_multiply(assembly) -> None:
    blocks = [block for block in re.split(r"\n\.LBB", assembly) if "tdpbf16ps" in block]
    # the tightest of them: what is around it takes up sums, or goes straight on to rounding
    loop = min(blocks, key=lambda block: block.count("\n") / block.count("tdpbf16ps"))
    steps = loop.count("tdpbf16ps") // 4
    assert loop.count("tileload") == 4 * steps and "zmm" not in loop
    # eight instructions a step, and the addresses
    assert loop.count("\n") <= 13 * steps + 8


def test_levels_are_looked_up_in_a_register(assembly) -> None:
    # one look-up for 32 weights, from a table made once for each group
    assert re.search(r"vpermw\t%zmm\d+, %zmm\d+, %zmm\d+", assembly)
    assert "gather" not in assembly


def test_bf16_is_rounded_by_the_processor(assembly) -> None:
    assert "vcvtne2ps2bf16" in assembly
