"""The quantized matrix, for every format in the folder and every way to store its parameters."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from qtune.quant import weight as module
from qtune.quant.format import Params, format_names
from qtune.quant.storage import Storage
from qtune.quant.weight import (
    QuantWeight,
    dequantize,
    fit,
    from_bytes,
    quantize,
    settle,
    storage_bytes,
    stored_dtypes,
    to_bytes,
)
from qtune_kernels.packing import unpack
from qtune_kernels.scales import dequantize_scales, unpack_zeros

# e8p has no groups
NAMES = [name for name in format_names() if name != "e8p"]
EVERY = pytest.mark.parametrize("name", NAMES)
# the most squared error of normal values, in parts of their square, with groups of any size
BOUNDS = {8: 2e-4, 4: 0.03, 3: 0.08, 2: 0.3}
SHAPES = [(64, 64), (16, 1000), (13, 77), (1, 1), (1, 63), (300, 128)]
SHAPE_IDS = pytest.mark.parametrize("shape", SHAPES, ids=str)
KINDS: list[dict[str, Any]] = [
    {},
    {"scales": "dynamic", "zeros": "half"},
    {"scales": "linear", "zeros": "float"},
    {"scales": "half"},
    {"scales": "float", "zeros": "float"},
]


def random_weight(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def back(made: QuantWeight, storage: Storage, shape: tuple[int, int], size: int = 64) -> Tensor:
    return dequantize(made, storage.number_format, size, shape, torch.float32)


def stored_params(made: QuantWeight, storage: Storage) -> Params:
    scales = dequantize_scales(made.scales)
    if made.scales.zeros is None:
        return Params(scales)
    bits = storage.number_format.bits
    return Params(scales, unpack_zeros(made.scales.zeros, bits, len(scales)))


def groups_of(weight: Tensor, size: int = 64) -> Tensor:
    return pad(weight.flatten(), (0, -weight.numel() % size)).view(-1, size)


@EVERY
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, "row", "tensor"])
@pytest.mark.parametrize("shape", [(13, 77), (1, 63)], ids=str)
def test_round_trip_error(name: str, group_size: Any, shape: tuple[int, int]) -> None:
    storage, weight = Storage(name, group_size), random_weight(shape)
    size = storage.weights_of_group(shape)
    found = back(quantize(weight, storage, size), storage, shape, size)
    assert found.shape == shape
    error = (found - weight).square().sum() / weight.square().sum()
    assert error <= BOUNDS[storage.number_format.bits]


@EVERY
@pytest.mark.parametrize("kinds", KINDS, ids=str)
def test_weights_are_levels_less_zeros_times_scales(name: str, kinds: dict[str, Any]) -> None:
    storage, shape = Storage(name, **kinds), (24, 200)
    fmt = storage.number_format
    made = quantize(random_weight(shape), storage, 64)
    codes = unpack(made.packed, fmt.bits, 24 * 200).view(-1, 64)
    expected = fmt.decode(codes, stored_params(made, storage)).view(shape)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(dequantize(made, fmt, 64, shape, dtype), expected.to(dtype))


@EVERY
def test_dtype_of_the_input_does_not_matter(name: str) -> None:
    storage, weight = Storage(name), random_weight((32, 96), torch.bfloat16)
    assert _equal(quantize(weight, storage, 64), quantize(weight.double(), storage, 64))


@EVERY
@pytest.mark.parametrize(
    "view",
    [lambda w: w.t(), lambda w: w[:, ::2], lambda w: w[1:, 3:], lambda w: w.requires_grad_()],
    ids=["transposed", "strided", "offset", "with gradient"],
)
def test_views(name: str, view: Callable[[Tensor], Tensor]) -> None:
    storage, weight = Storage(name), view(random_weight((48, 130)))
    copy = weight.detach().clone(memory_format=torch.contiguous_format)
    made = quantize(weight, storage, 64)
    assert _equal(made, quantize(copy, storage, 64))
    assert not any(tensor.requires_grad for tensor in _tensors(made))


@EVERY
@pytest.mark.parametrize("group_size", [16, 64, 256])
def test_slices_leave_no_seams(name: str, group_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, weight = Storage(name), random_weight((50, 77))
    whole = quantize(weight, storage, group_size)
    monkeypatch.setattr(module, "SLICE", 512)
    assert _equal(whole, quantize(weight, storage, group_size))


@EVERY
@SHAPE_IDS
def test_codes_are_those_of_the_format(name: str, shape: tuple[int, int]) -> None:
    storage, weight = Storage(name), random_weight(shape)
    fmt, made = storage.number_format, quantize(weight, storage, 64)
    fitted = fit(weight.flatten(), fmt, 64)
    params = stored_params(made, storage) if fmt.encodes_stored_scales else fitted
    codes = fmt.encode(groups_of(weight), params).flatten()[: weight.numel()]
    found = unpack(made.packed, fmt.bits, weight.numel())
    # a value that is halfway but for the last bit may go either way
    assert (found != codes).sum() <= weight.numel() / 10_000
    assert ((found.int() - codes.int()).abs() <= 1).all() or not fmt.levels


@EVERY
@pytest.mark.parametrize("kinds", KINDS, ids=str)
def test_storage_bytes_are_the_real_sizes(name: str, kinds: dict[str, Any]) -> None:
    sizes: list[tuple[tuple[int, int], Any]] = [((13, 77), 16), ((16, 1000), "row")]
    for shape, group_size in [*sizes, ((1, 63), 64), ((300, 128), "tensor")]:
        storage = Storage(name, group_size, **kinds)
        size = storage.weights_of_group(shape)
        made = quantize(torch.empty(shape, device="meta"), storage, size)
        tensors = to_bytes(made, storage)
        assert {t.dtype for t in tensors.values()} == {torch.uint8}
        found = {key: tensor.nbytes for key, tensor in tensors.items()}
        assert found == storage_bytes(shape, storage)


@EVERY
def test_meta_foretells_the_real_tensors(name: str) -> None:
    storage = Storage(name)
    real = quantize(random_weight((13, 77)), storage, 64)
    meta = quantize(torch.empty(13, 77, device="meta"), storage, 64)
    for one, other in zip(_tensors(real), _tensors(meta), strict=True):
        assert other.is_meta and (one.shape, one.dtype) == (other.shape, other.dtype)
    made = dequantize(meta, storage.number_format, 64, (13, 77), torch.bfloat16)
    assert (made.device.type, made.shape, made.dtype) == ("meta", (13, 77), torch.bfloat16)


def test_channel_factors_are_counted() -> None:
    sizes = storage_bytes((8, 100), Storage(channels=True))
    assert sizes["channels"] == 200


@EVERY
@pytest.mark.parametrize("kinds", KINDS, ids=str)
def test_bytes_and_back(name: str, kinds: dict[str, Any]) -> None:
    storage = Storage(name, **kinds)
    made = quantize(random_weight((13, 77)), storage, 64)
    assert _equal(made, from_bytes(to_bytes(made, storage), stored_dtypes(storage)))


@EVERY
@pytest.mark.parametrize("kinds", KINDS, ids=str)
@pytest.mark.parametrize("shape", [(40,), (8, 5)], ids=str)
def test_settled_parameters_are_what_decodes(
    name: str, kinds: dict[str, Any], shape: tuple[int, ...]
) -> None:
    storage = Storage(name, **kinds)
    params = storage.number_format.fit(random_weight((*shape, 64)))
    settled = settle(params, storage)
    flat = stored_params(QuantWeight(torch.empty(0), settled.tensors), storage)
    assert torch.equal(settled.params.scales, flat.scales.view(shape))
    near = 0.02 * params.scales.abs().max()
    assert (settled.params.scales - params.scales).abs().max() <= near
    if settled.params.zeros is None:
        assert params.zeros is None
    else:
        assert flat.zeros is not None and torch.equal(settled.params.zeros, flat.zeros.view(shape))
        wanted = 0 if params.zeros is None else params.zeros
        assert torch.equal(settled.params.zeros, torch.zeros(shape) + wanted)


@EVERY
def test_linear_scales_are_halves_unless_told_otherwise(name: str) -> None:
    storage = Storage(name)
    made = quantize(random_weight((300, 128)) * 0.02, storage, 64)
    scales = dequantize_scales(made.scales)
    assert (storage.scale_kind == "linear") == (name not in ("nf4", "fp4"))
    assert storage.scale_kind == "dynamic" or torch.equal(scales.half().float(), scales)


@EVERY
def test_zeros_come_back_as_zeros(name: str) -> None:
    storage, weight = Storage(name), random_weight((8, 256))
    fmt = storage.number_format
    weight.view(-1, 64)[::2] = 0
    found = back(quantize(weight, storage, 64), storage, (8, 256)).view(-1, 64)[::2]
    # a scale of 0 is stored to a 255th of the range of scales; not all formats have a level at 0
    smallest = 0 if not fmt.levels or fmt.zero_kind else min(abs(x) for x in fmt.levels)
    assert found.abs().max() <= smallest * 0.02 * weight.abs().max()
    nothing = torch.zeros(8, 256)
    assert torch.equal(back(quantize(nothing, storage, 64), storage, (8, 256)), nothing)


@EVERY
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_the_error_does_not_depend_on_the_size(name: str, size: float) -> None:
    storage, weight = Storage(name), random_weight((32, 256))
    plain = back(quantize(weight, storage, 64), storage, (32, 256)) - weight
    sized = back(quantize(weight * size, storage, 64), storage, (32, 256)) / size - weight
    assert sized.norm() == pytest.approx(float(plain.norm()), rel=0.05)


@EVERY
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_weights_that_are_no_numbers_are_refused(name: str, value: float) -> None:
    weight = random_weight((8, 256))
    weight[3, 7] = value
    with pytest.raises(ValueError, match="infinities or NaN"):
        quantize(weight, Storage(name), 64)


def test_nf4_codes_survive_another_round() -> None:
    # scales are positive here; a much smaller one than its neighbours' may be stored as <= 0
    storage, weight = Storage("nf4"), random_weight((64, 512))
    once = quantize(weight, storage, 64)
    again = quantize(back(once, storage, (64, 512)), storage, 64)
    assert torch.equal(again.packed, once.packed)
    a, b = dequantize_scales(again.scales), dequantize_scales(once.scales)
    assert (a - b).abs().max() <= 0.01 * (b.max() - b.min())


@pytest.mark.parametrize("name", ["int8", "int4", "int4_sym"])
def test_another_round_costs_little(name: str) -> None:
    # codes may move: where the stored scale is larger than the group's largest weight, no code
    # reaches the end, and the second scale is fitted to what is there
    storage, weight = Storage(name), random_weight((64, 512))
    once = back(quantize(weight, storage, 64), storage, (64, 512))
    again = back(quantize(once, storage, 64), storage, (64, 512))
    assert (again - once).norm() <= 0.35 * (once - weight).norm() or name == "int8"
    assert (again - weight).norm() <= 1.2 * (once - weight).norm()


def test_more_bytes_for_scales_never_lose() -> None:
    spread = torch.rand(64, 1, generator=torch.Generator().manual_seed(2))
    weight = random_weight((64, 512)) * spread
    errors = {}
    for kind in ("float", "half", "linear", "dynamic"):
        storage = replace(Storage("int4"), scales=kind)  # type: ignore[arg-type]
        found = back(quantize(weight, storage, 64), storage, (64, 512))
        errors[kind] = float((found - weight).norm())
    assert all(error <= 1.02 * errors["float"] for error in errors.values())


def _equal(a: QuantWeight, b: QuantWeight) -> bool:
    return all(torch.equal(x, y) for x, y in zip(_tensors(a), _tensors(b), strict=True))


def _tensors(made: QuantWeight) -> list[Tensor]:
    return [tensor for tensor in (made.packed, *made.scales) if tensor is not None]
