"""QA-LoRA against PEFT's own formula and float64, and its merge into zero points."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.variants import QALoraLinearVariant
from torch import Tensor, nn

from qtune.errors import UserError
from qtune.model import load
from qtune.model.lora import QuantLoraLinear
from qtune.model.qa_lora import check_groups, merged, pooled
from qtune.quant.format import format_names
from qtune.quant.linear import QuantLinear
from qtune.quant.storage import Storage

FORMATS = sorted({*format_names()} - {"e8p"})
IN, OUT, RANK = 128, 24, 4


@pytest.fixture(autouse=True)
def registered() -> None:
    load.register()


class Net(nn.Module):
    """One layer under a name that adapters can target."""

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        self.proj = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj(x)
        return y


def adapted(
    name: str = "int4", dropout: float = 0.0, **storage: Any
) -> tuple[PeftModel, QuantLoraLinear]:
    """A model with a trained adapter, and its layer."""
    torch.manual_seed(0)
    storage = {"group_size": 32} | storage
    layer = QuantLinear.from_linear(nn.Linear(IN, OUT), Storage(format=name, **storage))
    config = LoraConfig(
        r=RANK, lora_alpha=6, target_modules=["proj"], use_qalora=True, lora_dropout=dropout
    )
    model = get_peft_model(Net(layer), config)
    wrapper = model.base_model.model.proj
    assert isinstance(wrapper, QuantLoraLinear)
    nn.init.normal_(wrapper.lora_B["default"].weight, std=0.2)
    return model, wrapper


@pytest.mark.parametrize("name", FORMATS)
def test_the_update_is_that_of_peft(name: str) -> None:
    model, layer = adapted(name)
    assert layer.lora_A["default"].weight.shape == (RANK, IN // 32)
    x = torch.randn(3, 5, IN)
    layer.qalora_group_size = {"default": 32}
    expected = QALoraLinearVariant.forward(layer, "default", x, layer.quantized(x))
    torch.testing.assert_close(model(x), expected)


def test_gradients_against_float64() -> None:
    model, layer = adapted(rotated=True)
    x, dy = torch.randn(7, IN), torch.randn(7, OUT)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    found = torch.autograd.grad(model(x), (a, b), dy)
    exact = [t.detach().double().requires_grad_() for t in (a, b)]
    # the sum over a group of 32, times 4 groups over 32 weights
    rows = layer.quantized.inner_input(x).double().view(7, 4, 32).sum(-1) * 4 / 32
    y = rows @ exact[0].T @ exact[1].T * 6 / RANK
    for ours, truth in zip(found, torch.autograd.grad(y, exact, dy.double()), strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("storage", [{}, {"rotated": True}, {"group_size": "row"}], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_the_merge_into_zero_points_is_exact(name: str, storage: dict[str, Any]) -> None:
    model, layer = adapted(name, **storage)
    x = torch.randn(16, IN)
    with torch.no_grad():
        expected, tuned = model(x), merged(layer, "default")
    assert tuned.storage.zero_kind == "float"
    assert tuned.storage.scale_kind == layer.quantized.storage.scale_kind
    change = (tuned(x) - expected).norm() / expected.norm()
    assert change < 1e-6 and not torch.allclose(layer.quantized(x), expected, rtol=1e-2)


def test_zero_points_in_float16_would_not_be() -> None:
    # 2^-11 of a zero point of up to 15
    _, layer = adapted("int4")
    tuned = merged(layer, "default")
    zeros = tuned.quant_weight.scales.zeros
    assert zeros is not None
    lost = (zeros.half().float() - zeros).abs().max()
    assert 1e-5 < lost <= 15 * 2**-11


def test_peft_merges_it_into_a_dense_layer() -> None:
    model, _ = adapted(rotated=True)
    x = torch.randn(4, IN)
    expected = model(x)
    dense = model.merge_and_unload()
    assert type(dense.proj) is nn.Linear
    torch.testing.assert_close(dense(x), expected, rtol=1e-5, atol=1e-5)


def test_dropout_is_on_the_pooled_update_alone() -> None:
    model, layer = adapted(dropout=0.5)
    x = torch.randn(4, IN)
    trained, again = model.train()(x), model(x)
    assert not torch.equal(trained, again)
    with model.disable_adapter():
        assert torch.equal(model(x), layer.quantized(x))


def test_inputs_are_pooled_over_the_groups_of_inner_inputs() -> None:
    _, layer = adapted()
    x = torch.arange(float(IN)).expand(2, IN)
    # means of 0..31, 32..63 and so on, times the four groups
    assert pooled(layer.quantized, x).tolist() == [[62.0, 190.0, 318.0, 446.0]] * 2


@pytest.mark.parametrize("group_size", ["tensor", 256], ids=str)
def test_groups_that_are_no_parts_of_rows_are_refused(group_size: Any) -> None:
    storage = Storage(format="int4", group_size=group_size)
    layer = QuantLinear.from_linear(nn.Linear(IN, OUT), storage)
    with pytest.raises(UserError, match=r"rows of a\.b, which have 128; take a smaller"):
        check_groups("a.b", layer)


def test_a_group_without_a_scale_cannot_take_the_update() -> None:
    _, layer = adapted("nf4", scales="float")
    scales = layer.quantized.quant_weight.scales.codes
    scales[3] = 0
    with pytest.raises(UserError, match="1 groups of a layer"):
        merged(layer, "default")
