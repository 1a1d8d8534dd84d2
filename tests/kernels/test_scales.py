from collections.abc import Iterator

import pytest
import torch

from qtune_kernels.scales import Scales, dequantize_scales, dynamic_map, quantize_scales

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
    made = quantize_scales(torch.empty(600, device="meta"))
    assert [part.shape for part in made] == [(600,), (3,), (1,)]
