"""The fused layer against PEFT's own on the dequantized matrix in float64; PEFT's verbs."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from qtune.errors import UserError
from qtune.model import load
from qtune.model.lora import QuantLoraLinear
from qtune.quant.linear import QuantLinear, unpacked
from qtune.quant.storage import Storage

IN, OUT, RANK = 100, 52, 4
STORAGES = {
    "nf4": Storage("nf4"),
    "int8": Storage("int8"),
    "zeros": Storage("int3", scales="half", zeros="half"),
    "rotated": Storage("int4", rotated=True),
    "channels": Storage("int4", "row", channels=True, rotated=True),
}


@pytest.fixture(autouse=True)
def registered() -> None:
    load.register()


class Net(nn.Module):
    """One layer under a name that adapters can target."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.proj = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj(x)
        return y


def quantized(dtype: torch.dtype = torch.float32, name: str = "nf4", bias: bool = True) -> Net:
    torch.manual_seed(0)
    dense, storage = nn.Linear(IN, OUT, bias=bias, dtype=dtype), STORAGES[name]
    layer = QuantLinear.from_linear(dense, storage)
    if storage.channels:
        layer.load(layer.pack(dense.weight, torch.linspace(0.5, 2, IN)))
    return Net(layer)


def dense(net: Net, dtype: torch.dtype) -> Net:
    """The same layer with its dequantized weight."""
    layer = net.proj
    assert isinstance(layer, QuantLinear)
    twin = nn.Linear(IN, OUT, bias=layer.bias is not None, dtype=dtype)
    twin.weight.data = layer.dequantize(torch.float32).to(dtype)
    if layer.bias is not None:
        twin.bias.data = layer.bias.to(dtype)
    return Net(twin).requires_grad_(False)


def adapt(net: Net, **settings: Any) -> PeftModel:
    """A PEFT model whose adapter is not zero."""
    options = {"r": RANK, "lora_alpha": 6, "target_modules": ["proj"], **settings}
    options.setdefault("init_lora_weights", False)
    torch.manual_seed(1)
    return get_peft_model(net, LoraConfig(**options))


def layer_of(model: nn.Module) -> PeftLoraLinear:
    return next(m for m in model.modules() if isinstance(m, PeftLoraLinear))


def pair(
    dtype: torch.dtype = torch.float32, name: str = "nf4", bias: bool = True, **settings: Any
) -> tuple[PeftModel, PeftModel]:
    """Ours, and PEFT's own in float64, with equal weights."""
    net = quantized(dtype, name, bias)
    truth = adapt(dense(net, torch.float64), **settings)
    ours = adapt(net, **settings)
    assert type(layer_of(ours)) is QuantLoraLinear
    assert type(layer_of(truth)) is PeftLoraLinear
    truth.load_state_dict(adapter_tensors(ours), strict=False)
    return ours, truth.double()


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if "lora" in name}


def step(model: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """y, dx, and the gradients of what trains."""
    x = x.detach().clone().requires_grad_()
    y = model(x)
    y.backward(dy)
    assert x.grad is not None
    found = [p.grad for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return [y.detach(), x.grad, *[gradient for gradient in found if gradient is not None]]


def fused(model: nn.Module) -> bool:
    """Whether a forward pass takes the fused op."""
    y = model(torch.randn(2, IN, requires_grad=True))
    return "qtune_lora_linear" in type(y.grad_fn).__name__


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", STORAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fused_against_peft_in_float64(dtype: torch.dtype, name: str, bias: bool) -> None:
    ours, truth = pair(dtype, name, bias, use_rslora=True)
    assert fused(ours.to(torch.float32) if dtype == torch.float32 else ours.float())
    plain = adapt(dense(quantized(dtype, name, bias), dtype), use_rslora=True)
    plain.load_state_dict(adapter_tensors(ours), strict=False)
    x, dy = torch.randn(3, 5, IN).to(dtype), torch.randn(3, 5, OUT).to(dtype)
    ours_is_inner = STORAGES[name].rotated or STORAGES[name].channels
    exact = step(truth, x.double(), dy.double())
    found, stock = step(ours, x, dy), step(plain, x, dy)
    assert len(found) == len(stock) == len(exact) == 4
    for mine, theirs, right in zip(found, stock, exact, strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == right.shape
        # PEFT runs the adapter in float32 whatever x is; ours in the dtype of x
        rounding = right.norm() * torch.finfo(dtype).eps
        if ours_is_inner:
            # and so are the inputs and adapters that inner weights meet
            rounding = 4 * rounding
        allowed = 2 * (theirs.double() - right).norm() + rounding
        assert (mine.double() - right).norm() <= allowed


def test_saves_no_dense_matrix() -> None:
    ours, _ = pair()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = torch.randn(3, IN, requires_grad=True)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        ours(x)
    own = {p.untyped_storage().data_ptr() for p in ours.parameters()} | {x.data_ptr()}
    extra = [t for t in kept if t.untyped_storage().data_ptr() not in own]
    assert [tuple(tensor.shape) for tensor in extra] == [(3, RANK)]


def test_first_layer_needs_no_gradient_of_its_input() -> None:
    ours, _ = pair()
    x, dy = torch.randn(4, IN), torch.randn(4, OUT)
    _, _, *expected = step(ours, x, dy)
    ours(x).backward(dy)
    found = [p.grad for p in ours.parameters() if p.requires_grad]
    for mine, right in zip(found, expected, strict=True):
        assert mine is not None and torch.equal(mine, right)


def test_unpacked_weights_give_the_same_bits() -> None:
    ours, _ = pair(torch.bfloat16)
    x = torch.randn(2, 3, IN).bfloat16()
    with torch.no_grad():
        expected = ours(x)
        with unpacked(ours):
            assert layer_of(ours).get_base_layer().dense is not None
            assert torch.equal(ours(x), expected)


def test_fresh_adapter_changes_nothing() -> None:
    net, x = quantized(), torch.randn(4, IN)
    expected = net(x)
    assert torch.equal(adapt(net, init_lora_weights=True)(x), expected)


@pytest.mark.parametrize("shape", [(IN,), (0, IN), (2, 3, 4, IN)], ids=str)
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    ours, truth = pair()
    x, dy = torch.randn(shape), torch.randn(*shape[:-1], OUT)
    for mine, right in zip(step(ours, x, dy), step(truth, x.double(), dy.double()), strict=True):
        torch.testing.assert_close(mine.double(), right, atol=1e-5, rtol=1e-5)


def dropped(model: PeftModel) -> None:
    model.train()


def two(model: PeftModel) -> None:
    config = copy.deepcopy(model.peft_config["default"])
    torch.manual_seed(2)
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])


def disabled(model: PeftModel) -> None:
    model.base_model.disable_adapter_layers()


def other(model: PeftModel) -> None:
    two(model)
    model.set_adapter("second")


def bias_trained(model: PeftModel) -> None:
    layer_of(model).get_base_layer().bias.requires_grad_()


CASES: dict[str, tuple[dict[str, Any], Callable[[PeftModel], None], bool]] = {
    "dropout in training": ({"lora_dropout": 0.5}, dropped, False),
    "dropout in evaluation": ({"lora_dropout": 0.5}, lambda model: model.eval(), True),
    "DoRA": ({"use_dora": True, "init_lora_weights": True}, lambda model: None, False),
    "rsLoRA": ({"use_rslora": True}, lambda model: None, True),
    "adapter with bias": ({"lora_bias": True}, lambda model: None, False),
    "trained bias": ({}, bias_trained, False),
    "two adapters": ({}, two, False),
    "another adapter": ({}, other, True),
    "switched off": ({}, disabled, False),
}


@pytest.mark.parametrize(("settings", "prepare", "takes_fused"), CASES.values(), ids=CASES)
def test_every_path_against_peft(
    settings: dict[str, Any], prepare: Callable[[PeftModel], None], takes_fused: bool
) -> None:
    ours, truth = pair(**settings)
    for model in (ours, truth):
        prepare(model)
    truth.double().load_state_dict(adapter_tensors(ours), strict=False)
    if ours.training and layer_of(ours).lora_bias["default"]:
        layer_of(ours).lora_B["default"].bias.data.normal_()
        truth.load_state_dict(adapter_tensors(ours), strict=False)
    assert fused(ours) == takes_fused
    x, dy = torch.randn(64, IN), torch.randn(64, OUT)
    results = []
    for model, dtype in ((ours, torch.float32), (truth, torch.float64)):
        # the same dropout mask for both
        torch.manual_seed(5)
        results.append(step(model, x.to(dtype), dy.to(dtype)))
    for mine, right in zip(*results, strict=True):
        torch.testing.assert_close(mine.double(), right, atol=1e-4, rtol=1e-4)


def test_dropout_path_equals_the_fused_one_where_nothing_is_dropped() -> None:
    ours, _ = pair(lora_dropout=0.3)
    x, dy = torch.randn(4, IN), torch.randn(4, OUT)
    expected = step(ours.eval(), x, dy)
    layer_of(ours).lora_dropout["default"].p = 0.0
    for mine, right in zip(step(ours.train(), x, dy), expected, strict=True):
        torch.testing.assert_close(mine, right, atol=1e-5, rtol=1e-5)


def test_autocast() -> None:
    ours, truth = pair()
    x = torch.randn(4, IN)
    with torch.autocast("cpu", torch.bfloat16):
        assert not fused(ours)
        y = ours(x)
    right = truth(x.double())
    assert (y.double() - right).norm() <= 0.02 * right.norm()


# dynamo makes one itself while it traces
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_compiles_to_one_graph(dropout: float) -> None:
    ours, _ = pair(lora_dropout=dropout)
    ours.eval()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    x, dy = torch.randn(4, IN), torch.randn(4, OUT)
    for mine, right in zip(step(compiled, x, dy), step(ours, x, dy), strict=True):
        torch.testing.assert_close(mine, right, atol=1e-5, rtol=1e-5)


def codes(model: PeftModel) -> dict[str, Tensor]:
    base = layer_of(model).get_base_layer()
    return {name: getattr(base, name).detach().clone() for name in base.tensor_names}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def update(model: PeftModel, name: str = "default") -> Tensor:
    layer = layer_of(model)
    a, b = layer.lora_A[name].weight.double(), layer.lora_B[name].weight.double()
    return layer.scaling[name] * b @ a


def test_merge_requantizes_and_unmerge_brings_the_codes_back() -> None:
    ours, _ = pair()
    x, before = torch.randn(4, IN), codes(ours)
    expected, weight = ours(x), layer_of(ours).get_base_layer().dequantize().double()
    ours.merge_adapter(safe_merge=True)
    expect_merged(ours, weight + update(ours))
    assert not fused(ours)
    error = (ours(x) - expected).norm() / expected.norm()
    assert 0 < error < 0.3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        ours.merge_adapter()
    ours.unmerge_adapter()
    assert same(codes(ours), before)
    assert torch.equal(ours(x), expected)


def expect_merged(model: PeftModel, weight: Tensor) -> None:
    """The codes are those of the weight, quantized once."""
    dense = nn.Linear(IN, OUT, bias=False)
    dense.weight.data = weight.float()
    once = QuantLinear.from_linear(dense)
    # sums in another order may round a weight to its neighbour
    assert (codes(model)["weight"] != once.weight).sum() <= 2


def test_merging_keeps_rotation_and_channel_factors() -> None:
    ours, _ = pair(name="channels")
    base = layer_of(ours).get_base_layer()
    weight, before = base.dequantize(torch.float32).double() + update(ours), codes(ours)
    ours.merge_adapter()
    assert torch.equal(codes(ours)["channels"], before["channels"])
    assert not torch.equal(codes(ours)["weight"], before["weight"])
    merged = base.dequantize(torch.float32).double()
    assert (merged - weight).norm() < 0.15 * weight.norm()
    ours.unmerge_adapter()
    assert same(codes(ours), before)


def test_int8_activations_take_the_path_of_peft() -> None:
    layer = QuantLinear.from_linear(nn.Linear(IN, OUT), Storage("int8", activations="int8"))
    ours = adapt(Net(layer))
    assert not fused(ours)
    x = torch.randn(4, IN)
    exact = layer(x).double() + x.double() @ update(ours).T
    assert torch.allclose(ours(x).double(), exact, atol=1e-5)


def test_two_adapters_are_merged_with_one_rounding() -> None:
    ours, _ = pair()
    weight = layer_of(ours).get_base_layer().dequantize().double()
    before = codes(ours)
    two(ours)
    total = weight + update(ours) + update(ours, "second")
    ours.merge_adapter(adapter_names=["default", "second"])
    expect_merged(ours, total)
    ours.unmerge_adapter()
    assert same(codes(ours), before)


def test_disabling_a_merged_adapter_unmerges_it() -> None:
    ours, x = pair()[0], torch.randn(4, IN)
    before = codes(ours)
    with ours.disable_adapter():
        expected = ours(x)
    ours.merge_adapter()
    with ours.disable_adapter():
        assert torch.equal(ours(x), expected)
    assert same(codes(ours), before)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["plain", "DoRA"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge_and_unload_gives_a_dense_layer(settings: dict[str, Any], dtype: torch.dtype) -> None:
    ours, truth = pair(dtype, **settings)
    x = torch.randn(8, IN).to(dtype)
    expected = truth(x.double())
    merged = ours.merge_and_unload(safe_merge=True)
    assert type(merged.proj) is nn.Linear and merged.proj.weight.dtype == dtype
    assert not merged.proj.weight.requires_grad
    error = (merged(x).double() - expected).norm() / expected.norm()
    assert error < (1e-5 if dtype == torch.float32 else 1e-2)


def test_unload_gives_the_layer_back() -> None:
    net = quantized()
    base, x = net.proj, torch.randn(2, IN)
    expected = net(x)
    unloaded = adapt(net).unload()
    assert unloaded.proj is base
    assert torch.equal(unloaded(x), expected)


def test_broken_adapter_is_not_merged_safely() -> None:
    ours, _ = pair()
    before = codes(ours)
    layer_of(ours).lora_A["default"].weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        ours.merge_adapter(safe_merge=True)
    assert same(codes(ours), before)


def test_adapter_with_bias_is_not_merged() -> None:
    ours, _ = pair(lora_bias=True)
    with pytest.raises(UserError, match="has lora_bias"):
        ours.merge_and_unload()


@pytest.mark.parametrize("start", ["gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora"])
def test_starts(start: str) -> None:
    """Those that move part of the base into the adapter leave the sum as it was, but rounded."""
    net, x = quantized(name="int8"), torch.randn(16, IN)
    assert isinstance(net.proj, QuantLinear)
    before, expected = net.proj.dequantize().double(), net(x)
    ours = adapt(net, init_lora_weights=start)
    layer = layer_of(ours)
    assert type(layer) is QuantLoraLinear and layer.quantized.weight.dtype == torch.uint8
    after = layer.quantized.dequantize().double()
    moves = start.startswith(("pissa", "olora"))
    assert torch.equal(before, after) != moves
    assert (ours(x) - expected).norm() <= (0.03 if moves else 1e-6) * expected.norm()
    if moves:
        assert update(ours).norm() > 0.1 * before.norm()
        plain = adapt(dense(quantized(name="int8"), torch.float32), init_lora_weights=start)
        residual = layer_of(plain).get_base_layer().weight.double()
        if "niter" not in start:
            assert (after - residual).norm() <= 0.02 * residual.norm()
