"""The file of trained codes: what is in it, and what it is refused for."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from qtune.errors import UserError
from qtune.model import codes_file, load
from qtune.model.lora import QuantLoraLinear
from qtune.quant.linear import QuantLinear
from qtune.quant.storage import Storage


@pytest.fixture(autouse=True)
def registered() -> None:
    load.register()


class Net(nn.Module):
    """One layer under a name that adapters can target."""

    def __init__(self, name: str = "int4") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj = QuantLinear.from_linear(nn.Linear(64, 6), Storage(format=name))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj(x)
        return y


def adapted(name: str = "int4") -> tuple[PeftModel, QuantLoraLinear]:
    model = get_peft_model(Net(name), LoraConfig(r=2, target_modules=["proj"]))
    layer = model.base_model.model.proj
    assert isinstance(layer, QuantLoraLinear)
    return model, layer


def trained() -> tuple[PeftModel, QuantLoraLinear]:
    model, layer = adapted()
    layer.train_merged()
    assert layer.merge_aware is not None
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(0, 0.1)
    layer.renew_codes()
    layer.merge_aware.serves = True
    return model, layer


def test_loaded_codes_are_the_trained_model_without_an_adapter(tmp_path: Path) -> None:
    model, _ = trained()
    codes_file.write(model, tmp_path)
    saved = load_file(tmp_path / "codes.safetensors")
    assert {name: t.dtype for name, t in saved.items()} == {"proj.codes": torch.uint8}
    again, loaded = adapted()
    tuned = codes_file.put(again, codes_file.read(tmp_path))
    x = torch.randn(5, 64)
    assert torch.equal(again(x), model(x))
    assert tuned == {"proj": loaded.quantized} and loaded.is_settled
    assert not any("lora_" in name for name, _ in again.named_parameters())
    assert again.active_peft_config.r == 0
    with again.disable_adapter():
        assert torch.equal(again(x), Net()(x))


def test_a_model_that_serves_no_codes_has_no_file(tmp_path: Path) -> None:
    model, layer = trained()
    assert layer.merge_aware is not None
    layer.merge_aware.serves = False
    codes_file.write(model, tmp_path)
    codes_file.write(adapted()[0], tmp_path)
    assert not list(tmp_path.iterdir())
    assert codes_file.read(tmp_path) == {}
    assert codes_file.put(adapted()[0], {}) == {}


def test_codes_of_another_model_are_refused(tmp_path: Path) -> None:
    model, _ = trained()
    codes_file.write(model, tmp_path)
    saved = codes_file.read(tmp_path)
    with pytest.raises(UserError, match="192 bytes of codes of proj, which has 128 here"):
        codes_file.put(adapted("int2")[0], saved)
    with pytest.raises(UserError, match="codes of other, which is no quantized layer"):
        codes_file.put(adapted()[0], {"other.codes": saved["proj.codes"]})
    (tmp_path / codes_file.FILE).write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"codes\.safetensors cannot be read"):
        codes_file.read(tmp_path)
