"""Kernels run in Triton's interpreter where there is no GPU.

Triton looks at TRITON_INTERPRET while it is imported, so it is set here, before any test module of this
folder is. Tests of compiled code start processes of their own without it (machine_code.py).
"""

import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# support modules lie beside the tests, and folders of tests are no packages
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers for a test, whichever others run."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: the GPU, or the CPU with a corrected interpreter."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    from interpreter import correct_interpreter

    correct_interpreter()
    return torch.device("cpu")
