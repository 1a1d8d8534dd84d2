from collections.abc import Iterator

import pytest
import torch

from qtune_kernels.scales import (
    Scales,
    dequantize_scales,
    dynamic_map,
    linear_scales,
    pack_zeros,
    quantize_scales,
    unpack_zeros,
)

functional = pytest.importorskip("bitsandbytes").functional


@pytest.fixture(autouse=True)
def nothing_is_compiled() -> Iterator[None]:
    # bitsandbytes compiles its generic CPU path, which takes minutes
    with torch.compiler.set_stance("force_eager"):
        yield


def random_scales(num_scales: int) -> torch.Tensor:
    return torch.rand(num_scales) * 0.05 + 0.002


def test_the_map_is_that_of_bitsandbytes() -> None:
    assert torch.equal(dynamic_map(torch.device("cpu")), functional.create_dynamic_map())


@pytest.mark.parametrize("num_scales", [5, 255, 256, 300, 5000])
def test_codes_are_those_of_the_nearest_levels(num_scales: int) -> None:
    scales = random_scales(num_scales)
    made = quantize_scales(scales)
    spread = made.scales.repeat_interleave(256)[:num_scales]
    ratios = ((scales - scales.mean()) / spread).double()
    levels = dynamic_map(torch.device("cpu")).double()
    chosen = (levels[made.codes.long()] - ratios).abs()
    nearest = (levels - ratios.unsqueeze(1)).abs().amin(1)
    # a ratio within rounding of a midpoint may go either way
    assert ((chosen - nearest) < 1e-6).all()


def test_decoding_agrees_with_bitsandbytes_bit_for_bit() -> None:
    codes, state = functional.quantize_blockwise(random_scales(4096) - 0.027, blocksize=256)
    offset = torch.tensor([0.027])
    theirs = functional.dequantize_blockwise(codes, state) + offset
    assert torch.equal(dequantize_scales(Scales(codes, state.absmax, offset)), theirs)


def test_encoding_agrees_with_bitsandbytes_but_for_its_coarser_table() -> None:
    scales = random_scales(100_000)
    made = quantize_scales(scales)
    codes, state = functional.quantize_blockwise(scales - scales.mean(), blocksize=256)
    assert torch.equal(made.scales, state.absmax)
    differing = made.codes != codes
    assert differing.count_nonzero() < 0.005 * scales.numel()
    ratios = (scales - scales.mean()) / made.scales.repeat_interleave(256)[: scales.numel()]
    levels = dynamic_map(torch.device("cpu"))
    ours, theirs = ((levels[kind.int()] - ratios).abs() for kind in (made.codes, codes))
    # their table has 65536 entries between -1 and 1
    assert ((theirs - ours) > -1e-6).all() and ((theirs - ours) < 4 / 65535).all()


def test_a_single_scale_is_the_offset() -> None:
    made = quantize_scales(torch.tensor([0.3]))
    assert made.scales.tolist() == [0.0]
    assert dequantize_scales(made).equal(torch.tensor([0.3]))


def test_equal_scales_come_back_as_they_are() -> None:
    made = quantize_scales(torch.full((300,), 0.25))
    assert made.codes.count_nonzero() == 0
    assert torch.equal(dequantize_scales(made), torch.full((300,), 0.25))


def test_meta_tensors_have_the_same_shapes() -> None:
    scales = torch.empty(600, device="meta")
    for made in (quantize_scales(scales), linear_scales(scales)):
        assert [part.shape for part in made[:3]] == [(600,), (3,), (1,)]
        assert dequantize_scales(made).shape == (600,)


ANY_SCALES = {
    "common": lambda: random_scales(5000),
    "of both signs": lambda: torch.randn(700) * 0.01,
    "with outliers": lambda: random_scales(900).where(torch.rand(900) < 0.99, 2.0),
    "large": lambda: torch.rand(300) * 60000,
    "small": lambda: torch.rand(300) * 1e-4,
    "far from 0": lambda: 1 + torch.rand(300) * 1e-3,
    "a few": lambda: random_scales(3),
    "one": lambda: random_scales(1),
    "none that is not 0": lambda: torch.zeros(70),
}
ANY = pytest.mark.parametrize("make", ANY_SCALES.values(), ids=ANY_SCALES.keys())


@ANY
def test_linear_scales_are_numbers_of_16_bits(make) -> None:
    decoded = dequantize_scales(linear_scales(make()))
    assert torch.equal(decoded.half().float(), decoded)


@ANY
def test_linear_scales_are_whole_steps_from_the_offset(make) -> None:
    scales = make()
    made = linear_scales(scales)
    assert made.codes.dtype == torch.int8 and made.codes.shape == scales.shape
    assert (torch.frexp(made.scales).mantissa == 0.5).all()
    assert made.offset % made.scales.amax() == 0
    steps = made.scales.double().repeat_interleave(256)[: len(scales)]
    exact = made.codes.double() * steps + made.offset.double()
    assert torch.equal(dequantize_scales(made).double(), exact)


@ANY
def test_linear_scales_lie_within_a_step_that_is_as_small_as_can_be(make) -> None:
    scales = make()
    made = linear_scales(scales)
    steps = made.scales.repeat_interleave(256)[: len(scales)]
    assert ((dequantize_scales(made) - scales).abs() <= steps).all()
    for group, step in zip(scales.split(256), made.scales, strict=True):
        reach = (group - made.offset).abs().amax() / 127.5
        # or float16 would have no room for the number of steps, or no number so small
        finest = max(reach, group.abs().amax() / 2046, 2.0**-24)
        assert step <= 2 * finest


def test_linear_scales_are_about_as_exact_as_dynamic_ones() -> None:
    scales = random_scales(10_000)
    errors = [
        (dequantize_scales(made) - scales).norm() / scales.norm()
        for made in (linear_scales(scales), quantize_scales(scales))
    ]
    assert errors[0] < 1.5 * errors[1] < 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scales_that_are_no_codes_are_themselves(dtype: torch.dtype) -> None:
    scales, nothing = random_scales(300).to(dtype), torch.empty(0)
    assert torch.equal(dequantize_scales(Scales(scales, nothing, nothing)), scales.float())


@pytest.mark.parametrize(("bits", "field"), [(2, 2), (3, 4), (4, 4)])
@pytest.mark.parametrize("num_zeros", [1, 2, 7, 500])
def test_whole_zeros_lie_in_fields_the_first_lowest(num_zeros: int, bits: int, field: int) -> None:
    zeros = torch.randint(0, 1 << field, (num_zeros,))
    packed = pack_zeros(zeros, bits)
    per = 8 // field
    assert packed.dtype == torch.uint8 and len(packed) == -(-num_zeros // per)
    for group, zero in enumerate(zeros.tolist()):
        assert int(packed[group // per]) >> group % per * field & (1 << field) - 1 == zero
    assert torch.equal(unpack_zeros(packed, bits, num_zeros), zeros.float())
    assert torch.equal(pack_zeros(zeros.float(), bits), packed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_zeros_that_are_no_codes_are_themselves(dtype: torch.dtype) -> None:
    zeros = torch.randn(7).to(dtype)
    assert torch.equal(unpack_zeros(zeros, 4, 7), zeros.float())
