"""NF4 against bitsandbytes: codes, scales and dequantized weights bit for bit."""

from collections.abc import Callable, Iterator
from functools import partial

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from qtune.quant.format import Params, load_format
from qtune.quant.formats.nf4 import LEVELS
from qtune.quant.storage import Storage
from qtune.quant.weight import QuantWeight, dequantize, quantize, storage_bytes
from qtune_kernels.packing import from_bitsandbytes, to_bitsandbytes
from qtune_kernels.scales import Scales, dynamic_map

NF4 = load_format("nf4")
STORAGE = Storage("nf4")
quantize_4bit = partial(bnb.quantize_4bit, blocksize=64, quant_type="nf4")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# whole groups; groups that straddle rows; ragged tails, also with an odd number of weights; many
# scale groups. Rows of 32, 48, 96, ... are left out: bitsandbytes dequantizes them wrongly on
# CPUs with AVX-512 (rows of 100 and 1000 take its scalar path).
SHAPES = [(64, 64), (512, 576), (8, 1000), (10, 100), (33, 65), (3, 7), (1, 1)]


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    """bitsandbytes compiles its fallback for each shape, which takes minutes."""
    with torch.compiler.set_stance("force_eager"):
        yield


def random_weight(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(shape[0])
    spread = torch.rand(shape[0], 1, generator=generator) + 0.01
    return (torch.randn(shape, generator=generator) * spread).to(dtype)


def theirs(packed: Tensor, state: bnb.QuantState, num_weights: int) -> QuantWeight:
    """What bitsandbytes holds, in our layout."""
    scales = Scales(state.absmax, state.state2.absmax, state.offset.view(1))
    return QuantWeight(from_bitsandbytes(packed, num_weights), scales)


def test_levels_are_those_of_bitsandbytes() -> None:
    assert torch.equal(torch.tensor(LEVELS), bnb.get_4bit_type("nf4", device="cpu"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantized_as_by_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = random_weight(shape, dtype)
    packed, state = quantize_4bit(weight, compress_statistics=True)
    ours = quantize(weight, STORAGE, 64)
    assert torch.equal(to_bitsandbytes(ours.packed, weight.numel()), packed)
    assert torch.equal(ours.scales.scales, state.state2.absmax)
    assert torch.equal(ours.scales.offset, state.offset.view(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_group_maxima_are_those_of_bitsandbytes(dtype: torch.dtype) -> None:
    weight = random_weight((512, 576), dtype)
    _, state = quantize_4bit(weight, compress_statistics=False)
    assert torch.equal(NF4.fit(weight.float().view(-1, 64)).scales, state.absmax)


def test_scale_codes_differ_only_where_bitsandbytes_looks_them_up_coarsely() -> None:
    # its table for CPUs has 65536 cells, wider than the steps between the smallest levels
    weight = random_weight((2048, 1024), torch.float32)
    _, state = quantize_4bit(weight, compress_statistics=True)
    ours = quantize(weight, STORAGE, 64).scales
    levels = dynamic_map(weight.device).double()
    centred = (NF4.fit(weight.view(-1, 64)).scales - ours.offset).double()
    ratios = (centred.view(-1, 256) / ours.scales.double().unsqueeze(1)).flatten()
    ours_off, theirs_off = ((levels[c.int()] - ratios).abs() for c in (ours.codes, state.absmax))
    assert (ours_off <= theirs_off + 1e-7).all()
    assert (theirs_off <= ours_off + 2 / 65535).all()
    assert (ours.codes != state.absmax).sum() <= 0.0025 * ratios.numel()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantized_as_by_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = random_weight(shape, dtype)
    packed, state = quantize_4bit(weight, compress_statistics=True)
    ours = dequantize(theirs(packed, state, weight.numel()), NF4, 64, shape, dtype)
    assert torch.equal(ours, bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_conversion_loses_nothing_either_way(shape: tuple[int, int]) -> None:
    weight = random_weight(shape, torch.bfloat16)
    packed, _ = quantize_4bit(weight)
    ours = quantize(weight, STORAGE, 64).packed
    size = weight.numel()
    assert torch.equal(from_bitsandbytes(to_bitsandbytes(ours, size), size), ours)
    assert torch.equal(to_bitsandbytes(from_bitsandbytes(packed, size), size), packed)


def test_short_last_groups_are_rounded_alike() -> None:
    # bitsandbytes divides there instead of multiplying by the reciprocal
    generator = torch.Generator().manual_seed(0)
    for size in range(1, 64):
        for dtype in DTYPES:
            weight = torch.randn(1, size, generator=generator).to(dtype)
            packed, _ = quantize_4bit(weight)
            assert torch.equal(to_bitsandbytes(quantize(weight, STORAGE, 64).packed, size), packed)


def test_halfway_values_take_the_lower_level() -> None:
    levels = torch.tensor(LEVELS)
    halfway = (levels[:-1] + levels[1:]) / 2
    weight = torch.cat([halfway, torch.ones(1)]).repeat(4).view(1, 64)
    packed, _ = quantize_4bit(weight)
    codes = NF4.encode(weight, Params(torch.ones(1)))
    assert codes[0, :15].tolist() == list(range(15))
    assert torch.equal(to_bitsandbytes(quantize(weight, STORAGE, 64).packed, 64), packed)


def test_zero_groups_among_others() -> None:
    weight = random_weight((64, 256), torch.float32)
    weight.view(-1, 64)[::3] = 0
    packed, state = quantize_4bit(weight, compress_statistics=True)
    ours = quantize(weight, STORAGE, 64)
    assert torch.equal(to_bitsandbytes(ours.packed, weight.numel()), packed)
    back = dequantize(ours, NF4, 64, (64, 256), torch.float32)
    assert not back.view(-1, 64)[::3].any()
    assert torch.equal(
        dequantize(theirs(packed, state, weight.numel()), NF4, 64, (64, 256), torch.float32),
        bnb.dequantize_4bit(packed, state),
    )


def test_nearest_level_against_float64() -> None:
    groups = random_weight((64, 64), torch.float32)
    params = NF4.fit(groups)
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    ratios = groups.double() / params.scales.double().unsqueeze(1)
    distance = (ratios.unsqueeze(-1) - levels).abs()
    chosen = distance.gather(-1, NF4.encode(groups, params).long().unsqueeze(-1)).squeeze(-1)
    assert (chosen <= distance.amin(-1) + 1e-7).all()


def test_errors_on_normal_values(gaussian_error: Callable[..., float]) -> None:
    assert gaussian_error("nf4", search=False) == pytest.approx(0.0084, rel=0.02)


def test_bits_of_a_weight() -> None:
    size = sum(storage_bytes((1024, 1024), STORAGE).values())
    assert size * 8 / 2**20 == pytest.approx(4.127, abs=1e-3)
