"""Kernels run in Triton's interpreter where there is no GPU.

A kernel is compiled or interpreted according to TRITON_INTERPRET at the moment it is defined, so
it is set here, before the modules with kernels are imported (nothing but CUDA tensors and these
tests imports them). Tests of compiled code share processes without it (machine_code.py).
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from machine_code import Compiler

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


@pytest.fixture(scope="session")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Compiler]":
    """What compiles kernels for GPUs, in processes that all tests share."""
    from machine_code import Compiler

    made = Compiler(tmp_path_factory.mktemp("triton"))
    yield made
    made.close()
