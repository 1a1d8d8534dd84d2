"""Layers with trained scales against float64 autograd, in every format, rotated and not."""

import pytest
import torch
from torch import Tensor, nn

from qtune.model.scales import TrainedScales, decoded, largest_level, with_scales
from qtune.quant.format import format_names, load_format
from qtune.quant.linear import QuantLinear, unpacked
from qtune.quant.storage import Storage
from qtune_kernels.packing import unpack

# one scale for a whole matrix, refused by `adapt`
FORMATS = sorted({*format_names()} - {"e8p"})
AFFINE = [name for name in FORMATS if load_format(name).zero_kind is not None]
# in, out features, storage
VARIANTS = {
    "plain": (128, 24, {}),
    "odd": (100, 13, {}),
    "rotated": (192, 16, {"rotated": True}),
    "channels": (64, 10, {"channels": True}),
    "both": (128, 6, {"rotated": True, "channels": True}),
    "rows": (144, 6, {"group_size": "row"}),
    "whole": (64, 6, {"group_size": "tensor"}),
}


def make(
    name: str = "int4", size: tuple[int, int] = (128, 24), bias: bool = True, **storage: object
) -> QuantLinear:
    torch.manual_seed(0)
    dense = nn.Linear(*size, bias=bias)
    layer = QuantLinear.from_linear(dense, Storage(format=name, **storage))
    if layer.storage.channels:
        layer.load(layer.pack(dense.weight, torch.rand(size[0]) + 0.5))
    return layer


def dense_in_float64(layer: QuantLinear, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """The inner weight, code by code, differentiable in the parameters of its groups."""
    shape = (layer.out_features, layer.in_features)
    codes = unpack(layer.weight, layer.format.bits, shape[0] * shape[1]).long()
    values = layer.format.levels or [float(code - 128) for code in range(256)]
    levels = torch.tensor(values, dtype=torch.float64)[codes]

    def spread(of_groups: Tensor) -> Tensor:
        return of_groups.repeat_interleave(layer.group_size)[: levels.numel()]

    shifted = levels if zeros is None else levels - spread(zeros)
    return (shifted * spread(scales)).view(shape)


def close(found: Tensor, exact: Tensor, tolerance: float = 2e-5) -> bool:
    difference = (found.detach().double() - exact.detach()).norm()
    return bool(difference <= tolerance * exact.detach().norm())


def sample(layer: QuantLinear) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, layer.in_features), torch.randn(2, 3, layer.out_features)


@pytest.mark.parametrize("trains_zeros", [False, True], ids=["scales", "zeros too"])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_float64(variant: str, name: str, trains_zeros: bool) -> None:
    in_features, out_features, storage = VARIANTS[variant]
    layer = make(name, (in_features, out_features), **storage)
    module = TrainedScales(layer, zeros=trains_zeros)
    assert (module.shifts is not None) == (trains_zeros and name in AFFINE)
    x, dy = sample(layer)

    # the straight-through estimator: values as they are stored, gradients as if they were not
    tuned = decoded(module.tuned(layer))
    scales = tuned.scales.double().requires_grad_()
    zeros = None if tuned.zeros is None else tuned.zeros.double()
    if module.shifts is not None:
        assert zeros is not None
        shifts = (zeros * scales.detach()).requires_grad_()
        zeros = shifts / scales
    weight = dense_in_float64(layer, scales, zeros)
    inner = layer.inner_input(x).double()
    y = inner @ weight.T + layer.bias.double()
    wanted = [scales] if module.shifts is None else [scales, shifts]
    expected = torch.autograd.grad(y, wanted, dy.double())

    found = module(layer, x)
    assert close(found, y)
    ours = torch.autograd.grad(found, list(module.parameters()), dy)
    assert close(ours[0] * module.unit, expected[0])
    if module.shifts is not None:
        assert close(ours[1], expected[1])


@pytest.mark.parametrize("name", FORMATS)
def test_inputs_get_the_gradient_of_the_layer_below(name: str) -> None:
    layer = make(name, rotated=True)
    module = TrainedScales(layer, zeros=True)
    x, dy = sample(layer)
    x.requires_grad_()
    (found,) = torch.autograd.grad(module(layer, x), x, dy)
    (exact,) = torch.autograd.grad(module.tuned(layer)(x), x, dy)
    torch.testing.assert_close(found, exact)


@pytest.mark.parametrize("name", FORMATS)
def test_training_begins_at_the_base(name: str) -> None:
    layer = make(name)
    module = TrainedScales(layer, zeros=True)
    x, _ = sample(layer)
    if layer.storage.scale_kind == "dynamic":
        # whose scales are float32 numbers: they lose what float16 has no room for
        torch.testing.assert_close(module(layer, x), layer(x), rtol=0, atol=2e-3)
    else:
        assert torch.equal(module(layer, x), layer(x))


@pytest.mark.parametrize("name", FORMATS)
def test_one_unit_for_all_formats(name: str) -> None:
    # about the largest weight of each group, whatever its scale stands for
    layer = make(name, bias=False)
    largest = layer.dequantize(torch.float32).view(-1, 64).abs().amax(1)
    ratio = TrainedScales(layer, zeros=False).scales.detach().abs() / largest
    assert 0.4 < ratio.median() < 2.5


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_written_is_what_was_trained(name: str) -> None:
    layer = make(name, rotated=True)
    module = TrainedScales(layer, zeros=True)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.rand_like(parameter) * 0.01)
    tuned = module.tuned(layer)
    x, _ = sample(layer)
    assert torch.equal(module(layer, x), tuned(x))
    assert not torch.equal(tuned(x), layer(x))
    assert tuned.storage.scale_kind == "half" and tuned.weight is layer.weight
    assert tuned.storage.zero_kind == ("half" if name in AFFINE else None)


def test_frozen_zero_points_stay_as_they_are_stored() -> None:
    layer = make("int2")
    tuned = TrainedScales(layer, zeros=False).tuned(layer)
    assert tuned.storage.zero_kind == layer.storage.zero_kind == "codes"
    assert torch.equal(tuned.zeros, layer.zeros)


def test_unpacked_layers_give_the_same_and_forget_older_scales() -> None:
    layer = make("int4")
    module = TrainedScales(layer, zeros=True)
    x, _ = sample(layer)
    with torch.no_grad():
        for _ in range(2):
            module.scales.mul_(1.25)
            expected = module(layer, x)
            with unpacked(layer):
                layer.dense = layer.dequantize_inner(x.dtype)
                torch.testing.assert_close(module(layer, x), expected)
                assert not torch.allclose(layer(x), expected)


def test_parameters_without_data_have_their_sizes() -> None:
    layer = make("int3").to("meta")
    module = TrainedScales(layer, zeros=True)
    sizes = {name: (p.shape, p.dtype, p.is_meta) for name, p in module.named_parameters()}
    expected = (torch.Size([48]), torch.float32, True)
    assert sizes == {"scales": expected, "shifts": expected}
    assert module(layer, torch.empty(5, 128, device="meta")).shape == (5, 24)


@pytest.mark.parametrize(
    ("name", "expected"), [("nf4", 1.0), ("int8", 127.0), ("int4", 7.5), ("ternary", 1.0)]
)
def test_the_largest_level(name: str, expected: float) -> None:
    assert largest_level(make(name)) == expected


def test_other_scales_of_the_same_codes() -> None:
    layer = make("nf4", channels=True)
    found = decoded(layer)
    none = torch.empty(0)
    scales = layer.quant_weight.scales._replace(codes=found.scales * 2, scales=none, offset=none)
    doubled = with_scales(layer, scales)
    assert doubled.storage.scale_kind == "float"
    torch.testing.assert_close(
        doubled.dequantize(torch.float32), 2 * layer.dequantize(torch.float32)
    )
