"""The file of trained scales: what is in it, and what it is refused for."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qtune.errors import UserError
from qtune.model import load, scales_file
from qtune.model.lora import QuantLoraLinear
from qtune.quant.linear import QuantLinear
from qtune.quant.storage import Storage


@pytest.fixture(autouse=True)
def registered() -> None:
    load.register()


class Net(nn.Module):
    """One layer under a name that adapters can target."""

    def __init__(self, group_size: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        storage = Storage(format="int4", group_size=group_size)
        self.proj = QuantLinear.from_linear(nn.Linear(64, 6), storage)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj(x)
        return y


def adapted(group_size: int = 32) -> tuple[nn.Module, QuantLoraLinear]:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(Net(group_size), LoraConfig(r=0, target_modules=["proj"]))
    layer = model.base_model.model.proj
    assert isinstance(layer, QuantLoraLinear)
    return model, layer


def trained(*, zeros: bool = True) -> tuple[nn.Module, QuantLoraLinear]:
    model, layer = adapted()
    layer.train_scales(zeros=zeros)
    assert layer.trained_scales is not None
    with torch.no_grad():
        for parameter in layer.trained_scales.parameters():
            parameter.mul_(1.1)
    return model, layer


def test_scales_are_written_as_they_are_used(tmp_path: Path) -> None:
    model, layer = trained()
    scales_file.write(model, tmp_path)
    saved = load_file(tmp_path / "scales.safetensors")
    assert layer.trained_scales is not None
    tuned = layer.trained_scales.tuned(layer.quantized).quant_weight.scales
    assert saved.keys() == {"proj.scales", "proj.zeros"}
    assert torch.equal(saved["proj.scales"], tuned.codes)
    assert torch.equal(saved["proj.zeros"], tuned.zeros)
    assert {t.dtype for t in saved.values()} == {torch.float16}


def test_frozen_zero_points_are_not_in_it(tmp_path: Path) -> None:
    model, _ = trained(zeros=False)
    scales_file.write(model, tmp_path)
    assert load_file(tmp_path / "scales.safetensors").keys() == {"proj.scales"}


def test_values_may_come_from_outside_the_model(tmp_path: Path) -> None:
    model, layer = trained(zeros=False)
    assert layer.trained_scales is not None
    path = "base_model.model.proj.trained_scales.scales"
    whole = {path: layer.trained_scales.scales.detach() * 2}
    scales_file.write(model, tmp_path)
    first = scales_file.read(tmp_path)["proj.scales"]
    scales_file.write(model, tmp_path, whole)
    assert torch.equal(scales_file.read(tmp_path)["proj.scales"], first * 2)


def test_models_without_trained_scales_leave_no_file(tmp_path: Path) -> None:
    scales_file.write(adapted()[0], tmp_path)
    assert list(tmp_path.iterdir()) == [] and scales_file.read(tmp_path) == {}


def test_layers_take_what_was_written_and_give_it_back(tmp_path: Path) -> None:
    model, _ = trained()
    scales_file.write(model, tmp_path)
    other, layer = adapted()
    x = torch.randn(3, 64)
    before = other(x)
    base = layer.quantized
    assert scales_file.put(other, scales_file.read(tmp_path)) == {"proj": layer.quantized}
    assert torch.equal(other(x), model(x)) and not torch.equal(other(x), before)
    layer.enable_adapters(False)
    assert torch.equal(other(x), before) and layer.quantized is base
    layer.enable_adapters(True)
    assert torch.equal(other(x), model(x))


def test_scales_of_another_base_are_refused(tmp_path: Path) -> None:
    model, _ = trained()
    scales_file.write(model, tmp_path)
    saved = scales_file.read(tmp_path)
    with pytest.raises(UserError, match=r"12 scales of proj, which has 24 groups here; put quant"):
        scales_file.put(adapted(16)[0], saved)
    with pytest.raises(UserError, match="scales of other, which is no quantized layer"):
        scales_file.put(adapted()[0], {"other.scales": saved["proj.scales"]})


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    save_file({"proj.scales": torch.zeros(2)}, tmp_path / "scales.safetensors")
    path = tmp_path / "scales.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match=r"scales\.safetensors cannot be read"):
        scales_file.read(tmp_path)
