"""FP4 against bitsandbytes: codes and dequantized weights bit for bit."""

from collections.abc import Iterator
from functools import partial

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from qtune.quant.format import load_format
from qtune.quant.formats.fp4 import LEVELS
from qtune.quant.storage import Storage
from qtune.quant.weight import QuantWeight, dequantize, quantize
from qtune_kernels.packing import from_bitsandbytes, to_bitsandbytes
from qtune_kernels.scales import Scales

FP4 = load_format("fp4")
quantize_4bit = partial(bnb.quantize_4bit, blocksize=64, quant_type="fp4")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# see test_nf4.py for what is left out
SHAPES = [(64, 64), (512, 576), (10, 100), (33, 65), (3, 7)]


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    """bitsandbytes compiles its fallback for each shape, which takes minutes."""
    with torch.compiler.set_stance("force_eager"):
        yield


def random_weight(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(shape[0])
    return torch.randn(shape, generator=generator).to(dtype)


def test_levels_are_those_of_bitsandbytes() -> None:
    assert torch.equal(torch.tensor(LEVELS), bnb.get_4bit_type("fp4", device="cpu"))
    # the exponents of a bias of 2 without subnormal numbers but one, over the largest
    assert sorted({abs(level) * 12 for level in LEVELS}) == pytest.approx(
        [0, 0.0625, 2, 3, 4, 6, 8, 12]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantized_as_by_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = random_weight(shape, dtype)
    packed, state = quantize_4bit(weight, compress_statistics=True)
    ours = quantize(weight, Storage("fp4"), 64)
    assert torch.equal(to_bitsandbytes(ours.packed, weight.numel(), 0), packed)
    scales = Scales(state.absmax, state.state2.absmax, state.offset.view(1))
    theirs = QuantWeight(from_bitsandbytes(packed, weight.numel()), scales)
    back = dequantize(theirs, FP4, 64, shape, dtype)
    assert torch.equal(back, bnb.dequantize_4bit(packed, state))


def test_nearest_level_against_float64() -> None:
    groups = random_weight((64, 64), torch.float32)
    params = FP4.fit(groups)
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    ratios = groups.double() / params.scales.double().unsqueeze(1)
    distance = (ratios.unsqueeze(-1) - levels).abs()
    chosen = distance.gather(-1, FP4.encode(groups, params).long().unsqueeze(-1)).squeeze(-1)
    assert (chosen <= distance.amin(-1) + 1e-7).all()
