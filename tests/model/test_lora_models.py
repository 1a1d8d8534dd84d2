"""Adapters on whole quantized models: saved, loaded with and without qtune, merged."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from qtune.model import load
from qtune.model.load import load_base
from qtune.model.lora import QuantLoraLinear
from qtune.quant.linear import QuantLinear
from qtune.recipe import Quant

CPU = torch.device("cpu")
RANK = 4


@pytest.fixture(autouse=True)
def registered() -> None:
    load.register()


def save_model(folder: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=96, max_position_embeddings=64,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def base(folder: Path, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    return load_base(folder, Quant(), device=CPU, dtype=dtype)


def tuned(folder: Path, **settings: Any) -> PeftModel:
    options = {"r": RANK, "target_modules": "all-linear", "init_lora_weights": False, **settings}
    torch.manual_seed(3)
    return get_peft_model(base(folder), LoraConfig(task_type="CAUSAL_LM", **options)).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.arange(3, 15)[None], use_cache=False).logits
    return found


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
def test_saved_adapter_comes_back_bit_for_bit(tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = save_model(tmp_path / "model")
    model = tuned(folder, **settings)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(base(folder), tmp_path / "adapter")
    assert any(type(layer) is QuantLoraLinear for layer in again.modules())
    assert torch.equal(logits(again), logits(model))
    again.load_adapter(tmp_path / "adapter", adapter_name="other")
    again.set_adapter("other")
    assert torch.equal(logits(again), logits(model))


def test_all_linear_leaves_the_output_layer_alone(tmp_path: Path) -> None:
    model = tuned(save_model(tmp_path))
    found = {n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, PeftLoraLinear)}
    assert found == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


PLAIN = """
import sys, torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
model = PeftModel.from_pretrained(model, sys.argv[2]).eval()
with torch.no_grad():
    logits = model(input_ids=torch.arange(3, 15)[None]).logits
save_file({"logits": logits}, sys.argv[3])
assert "qtune" not in sys.modules
"""


def test_adapter_loads_on_the_dense_model_without_qtune(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    model = tuned(folder)
    model.save_pretrained(tmp_path / "adapter")
    names = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    stored = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert len(stored) == 28 and all("lora_" in name for name in stored)
    paths = [str(tmp_path / name) for name in ("model", "adapter", "logits.safetensors")]
    done = subprocess.run(
        [sys.executable, "-I", "-c", PLAIN, *paths], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "logits.safetensors")["logits"]
    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, layer in twin.named_modules():
        if f"base_model.model.{name}.lora_A.weight" in stored:
            a, b = (stored[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
            layer.weight.data += 8 / RANK * b @ a
    torch.testing.assert_close(found, logits(twin), atol=1e-3, rtol=1e-3)


def test_merged_model_is_a_plain_one(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    config = LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(base(folder, torch.float32), config).eval()
    expected = logits(model)
    merged = model.merge_and_unload()
    assert not any(isinstance(layer, QuantLinear) for layer in merged.modules())
    torch.testing.assert_close(logits(merged), expected, atol=1e-3, rtol=1e-3)
