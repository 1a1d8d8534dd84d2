"""A layer that multiplies with the codes of weights and adapter together, against float64."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from qtune.errors import UserError
from qtune.model import load
from qtune.model.lora import QuantLoraLinear
from qtune.quant.dither import dithered
from qtune.quant.format import format_names
from qtune.quant.linear import QuantLinear, unpacked
from qtune.quant.storage import Storage
from qtune_kernels.packing import pack, unpack

FORMATS = sorted({*format_names()} - {"e8p"})
# in, out features, storage
VARIANTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "plain": (128, 24, {}),
    "odd": (100, 13, {}),
    "rotated": (192, 16, {"rotated": True}),
    "channels": (64, 10, {"channels": True}),
}
SCALING = 2.0


@pytest.fixture(autouse=True)
def registered() -> None:
    load.register()


class Net(nn.Module):
    """One layer under a name that adapters can target."""

    def __init__(self, name: str, variant: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        columns, rows, storage = VARIANTS[variant]
        self.original = nn.Linear(columns, rows)
        self.proj = QuantLinear.from_linear(self.original, Storage(format=name, **storage))
        if self.proj.storage.channels:
            factors = torch.rand(columns) + 0.5
            self.proj.load(self.proj.pack(self.original.weight, factors))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj(x)
        return y


def adapted(
    name: str = "int4", variant: str = "plain", *, original: bool = True
) -> QuantLoraLinear:
    """The layer with an adapter that does something, and its codes made."""
    net = Net(name, variant)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["proj"])
    layer = get_peft_model(net, config).base_model.model.proj
    assert isinstance(layer, QuantLoraLinear)
    layer.train_merged(original=original)
    assert layer.merge_aware is not None
    if original:
        layer.merge_aware.take(layer.quantized, net.original.weight.detach())
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(0, 0.05)
    layer.renew_codes()
    layer.merge_aware.serves = True
    return layer


def matrices(layer: QuantLoraLinear) -> tuple[Tensor, Tensor]:
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def served_weight(layer: QuantLoraLinear) -> Tensor:
    """What the codes stand for, for plain inputs, in float64."""
    assert layer.merge_aware is not None
    return layer.merge_aware.tuned(layer.quantized).dequantize(torch.float32).double()


def close(found: Tensor, exact: Tensor, tolerance: float = 2e-5) -> bool:
    difference = (found.detach().double() - exact.detach()).norm()
    return bool(difference <= tolerance * exact.detach().norm())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_product_and_gradients_are_the_straight_through_ones(variant: str, name: str) -> None:
    layer = adapted(name, variant)
    x = torch.randn(2, 3, layer.in_features, requires_grad=True)
    dy = torch.randn(2, 3, layer.out_features)
    y = layer(x)
    found = torch.autograd.grad(y, [x, *matrices(layer)], dy)

    leaves = [leaf.detach().double().requires_grad_() for leaf in (x, *matrices(layer))]
    change = SCALING * leaves[2] @ leaves[1]
    weight = change + (served_weight(layer) - change).detach()
    exact = leaves[0] @ weight.T + layer.quantized.bias.double()
    expected = torch.autograd.grad(exact, leaves, dy.double())
    assert close(y, exact)
    assert all(close(ours, truth) for ours, truth in zip(found, expected, strict=True))


@pytest.mark.parametrize("original", [False, True], ids=["random", "original"])
@pytest.mark.parametrize("name", ["nf4", "int3"])
def test_codes_are_nearest_to_weight_and_update(name: str, original: bool) -> None:
    layer = adapted(name, original=original)
    assert layer.merge_aware is not None
    base, (a, b) = layer.quantized, matrices(layer)
    target = dithered(base, layer.merge_aware.places).double()
    target = target + SCALING * b.detach().double() @ a.detach().double()
    own = (served_weight(layer) - target).abs()
    # every code of the format in the place of the one chosen
    for code in range(1 << base.format.bits):
        codes = torch.full(layer.quantized.shape, code, dtype=torch.uint8)
        other = QuantLinear(base.in_features, base.out_features, storage=base.storage)
        stored = {key: getattr(base, key) for key in base.tensor_names}
        other.load(stored | {"weight": pack(codes, base.format.bits)})
        distance = (other.dequantize(torch.float32).double() - target).abs()
        assert (own <= distance + 1e-6).all()


def test_nothing_is_trained_but_the_adapter() -> None:
    layer = adapted()
    trained = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"lora_A.default.weight", "lora_B.default.weight"}
    assert {p.dtype for p in layer.merge_aware.parameters()} == {torch.uint8}  # type: ignore[union-attr]


def test_without_adapters_it_is_the_base() -> None:
    layer = adapted()
    x = torch.randn(3, layer.in_features)
    served = layer(x)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.quantized(x)) and not torch.equal(layer(x), served)
    layer.enable_adapters(True)
    assert torch.equal(layer(x), served)


def test_until_it_serves_it_is_plain_lora() -> None:
    layer = adapted()
    assert layer.merge_aware is not None
    layer.merge_aware.serves = False
    x, (a, b) = torch.randn(3, layer.in_features), matrices(layer)
    torch.testing.assert_close(layer(x), layer.quantized(x) + SCALING * (x @ a.T) @ b.T)


def test_dense_weights_give_the_same_bits_also_of_new_codes() -> None:
    layer = adapted()
    layer.quantized.compute_dtype = torch.float32
    x = torch.randn(3, layer.in_features)
    with torch.no_grad():
        packed = layer(x)
        with unpacked(layer):
            assert torch.equal(layer(x), packed)
            layer.lora_B["default"].weight.mul_(3)
            layer.renew_codes()
            tripled = layer(x)
        assert torch.equal(layer(x), tripled) and not torch.equal(tripled, packed)


def test_what_is_written_are_the_codes_that_were_trained() -> None:
    layer = adapted()
    tuned = layer.merge_aware.tuned(layer.quantized)  # type: ignore[union-attr]
    x = torch.randn(3, layer.in_features)
    assert torch.equal(tuned(x), layer(x))
    assert torch.equal(layer.merged_weight(), tuned.dequantize(torch.float32))
    bits, count = tuned.format.bits, tuned.in_features * tuned.out_features
    assert (unpack(tuned.weight, bits, count) != unpack(layer.quantized.weight, bits, count)).any()
    with pytest.raises(UserError, match="export the run"):
        layer.merge()
