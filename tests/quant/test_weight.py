"""The quantized matrix, for every format in the folder."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qtune.quant import weight as module
from qtune.quant.format import format_names, load_format
from qtune.quant.weight import dequantize, quantize, storage_bytes
from qtune_kernels.packing import unpack
from qtune_kernels.scales import dequantize_scales

NAMES = format_names()
# largest error relative to the group's largest weight; the widest NF4 gap is 0.304, INT8's 1/127;
# storing the scale in 8 bits adds up to 1.5 %
BOUNDS = {4: 0.18, 8: 0.02}
SHAPES = [(64, 64), (16, 1000), (13, 77), (1, 1), (1, 63), (300, 128)]


def random_weight(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("group_size", [16, 64, 128])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip_error(name: str, group_size: int, shape: tuple[int, int]) -> None:
    fmt, weight = load_format(name), random_weight(shape)
    back = dequantize(quantize(weight, fmt, group_size), fmt, group_size, shape, torch.float32)
    assert back.shape == shape
    groups = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % group_size))
    largest = groups.view(-1, group_size).abs().amax(1).repeat_interleave(group_size)
    error = (back - weight).abs().flatten()
    assert (error <= BOUNDS[fmt.bits] * largest[: error.numel()]).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_are_code_times_scale_rounded_once(name: str, dtype: torch.dtype) -> None:
    fmt, shape = load_format(name), (24, 200)
    made = quantize(random_weight(shape), fmt, 64)
    codes = unpack(made.packed, fmt.bits, 24 * 200).view(-1, 64)
    expected = fmt.decode(codes, dequantize_scales(made.scales)).view(shape)
    assert torch.equal(dequantize(made, fmt, 64, shape, dtype), expected.to(dtype))


@pytest.mark.parametrize("name", NAMES)
def test_dtype_of_the_input_does_not_matter(name: str) -> None:
    fmt, weight = load_format(name), random_weight((32, 96), torch.bfloat16)
    assert _equal(quantize(weight, fmt, 64), quantize(weight.double(), fmt, 64))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "view",
    [lambda w: w.t(), lambda w: w[:, ::2], lambda w: w[1:, 3:], lambda w: w.requires_grad_()],
    ids=["transposed", "strided", "offset", "with gradient"],
)
def test_views(name: str, view: Callable[[Tensor], Tensor]) -> None:
    fmt, weight = load_format(name), view(random_weight((48, 130)))
    copy = weight.detach().clone(memory_format=torch.contiguous_format)
    made = quantize(weight, fmt, 64)
    assert _equal(made, quantize(copy, fmt, 64))
    assert not any(tensor.requires_grad for tensor in _tensors(made))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("group_size", [16, 64, 256])
def test_slices_leave_no_seams(name: str, group_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fmt, weight = load_format(name), random_weight((50, 77))
    whole = quantize(weight, fmt, group_size)
    monkeypatch.setattr(module, "SLICE", 512)
    assert _equal(whole, quantize(weight, fmt, group_size))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_are_those_of_the_format(name: str, shape: tuple[int, int]) -> None:
    fmt, weight = load_format(name), random_weight(shape)
    made = quantize(weight, fmt, 64)
    groups = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    scales = dequantize_scales(made.scales) if fmt.encodes_stored_scales else fmt.fit(groups)
    codes = fmt.encode(groups, scales).flatten()[: weight.numel()]
    assert torch.equal(unpack(made.packed, fmt.bits, weight.numel()), codes)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("group_size", [16, 64, 100, 128])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_storage_bytes_are_the_real_sizes(
    name: str, group_size: int, shape: tuple[int, int]
) -> None:
    fmt = load_format(name)
    foretold = storage_bytes(shape[0] * shape[1], fmt, group_size)
    for device in ("cpu", "meta"):
        made = quantize(torch.empty(shape, device=device).fill_(1), fmt, group_size)
        assert {t.device.type for t in _tensors(made)} == {device}
        assert [t.nbytes for t in _tensors(made)] == list(foretold.values())


@pytest.mark.parametrize("name", NAMES)
def test_dequantize_on_meta(name: str) -> None:
    fmt = load_format(name)
    made = quantize(torch.empty(24, 100, device="meta"), fmt, 64)
    back = dequantize(made, fmt, 64, (24, 100), torch.bfloat16)
    assert (back.device.type, back.shape, back.dtype) == ("meta", (24, 100), torch.bfloat16)


@pytest.mark.parametrize("name", NAMES)
def test_zeros_come_back_as_zeros(name: str) -> None:
    fmt, weight = load_format(name), random_weight((8, 256))
    weight.view(-1, 64)[::2] = 0
    back = dequantize(quantize(weight, fmt, 64), fmt, 64, (8, 256), torch.float32)
    assert not back.view(-1, 64)[::2].any()
    nothing = torch.zeros(8, 256)
    made = quantize(nothing, fmt, 64)
    assert torch.equal(dequantize(made, fmt, 64, (8, 256), torch.float32), nothing)


def test_nf4_codes_survive_another_round() -> None:
    # scales are positive here; a much smaller one than its neighbours' may be stored as <= 0
    fmt, weight = load_format("nf4"), random_weight((64, 512))
    once = quantize(weight, fmt, 64)
    back = dequantize(once, fmt, 64, (64, 512), torch.float32)
    again = quantize(back, fmt, 64)
    assert torch.equal(again.packed, once.packed)
    _same_scales_within_a_step(dequantize_scales(again.scales), dequantize_scales(once.scales))


def test_another_round_of_int8_costs_no_more_than_half_a_step() -> None:
    # codes may move: where the stored scale is larger than the group's largest weight, no code
    # reaches 127, and the second scale is fitted to what is there
    fmt, weight = load_format("int8"), random_weight((64, 512))
    once = dequantize(quantize(weight, fmt, 64), fmt, 64, (64, 512), torch.float32)
    again = dequantize(quantize(once, fmt, 64), fmt, 64, (64, 512), torch.float32)
    scales = once.view(-1, 64).abs().amax(1, keepdim=True)
    assert ((again - once).view(-1, 64).abs() <= 0.02 * scales).all()
    assert (again - once).norm() <= 1.05 * (once - weight).norm()


def _same_scales_within_a_step(a: Tensor, b: Tensor) -> None:
    spread = b.max() - b.min()
    assert (a - b).abs().max() <= 0.01 * spread


def _equal(a: module.QuantWeight, b: module.QuantWeight) -> bool:
    return all(torch.equal(x, y) for x, y in zip(_tensors(a), _tensors(b), strict=True))


def _tensors(made: module.QuantWeight) -> list[Tensor]:
    return [made.packed, *made.scales]
