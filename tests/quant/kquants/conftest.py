"""The truths: ggml's own encoders, and the decoders of package `gguf`."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

import ggml_encoder

Encode = Callable[..., Tensor]


@pytest.fixture
def ggml_encode() -> Encode:
    """(weight [O, I], kind, importance or None) -> the bytes that ggml makes of it."""
    pytest.importorskip("xllamacpp")
    return ggml_encoder.ggml_encode


@pytest.fixture
def decode() -> Encode:
    """(bytes [O, B], kind) -> the weights, float32 [O, I], that `gguf` reads."""
    return ggml_encoder.decode


@pytest.fixture
def weights() -> Callable[[str], Tensor]:
    """(shape of values) -> weights [48, 512]: normal ones, with heavy tails or all above 0."""

    def make(values: str) -> Tensor:
        torch.manual_seed(0)
        heavy = torch.distributions.StudentT(torch.tensor(5.0))
        drawn = heavy.sample((48, 512)) if values == "heavy" else torch.randn(48, 512)
        return 0.02 * (drawn.abs() if values == "positive" else drawn)

    return make


@pytest.fixture
def importance() -> Tensor:
    """Worths of 512 inputs that differ by orders of magnitude, as those of real models."""
    torch.manual_seed(1)
    return torch.randn(512).exp()
