"""The one kernel of the peer's, in Triton's interpreter: it is chosen when a kernel is defined."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[3] / "scripts"
PROGRAM = """
import torch
from gpu.unsloth_triton import gate_backward
from torch.nn.functional import silu

dh, e, g = (torch.randn(37, 53) for _ in range(3))
leaves = [e.double().requires_grad_(), g.double().requires_grad_()]
h = silu(leaves[0]) * leaves[1]
truth = [h, *torch.autograd.grad(h, leaves, dh.double())]
gate_backward(dh, e, g)
for mine, exact in zip((dh, e, g), truth):
    assert torch.allclose(mine.double(), exact, atol=1e-5), (mine, exact)
"""


def test_h_and_both_gradients_are_written_in_place() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(SCRIPTS)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
