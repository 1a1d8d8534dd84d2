"""The adapter as a stranger to qtune uses it."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qtune.export.adapter import base_name
from qtune.export.exporter import Trained, export
from qtune.model.merge import merged_tensors
from qtune.recipe import Lora

STRANGER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("qtune", "qtune_kernels"):
            raise ImportError(name + " is not installed here")

sys.meta_path.insert(0, Blocker())
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import save_file
from transformers import AutoTokenizer

folder, out = sys.argv[1:]
model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], return_dict=False)
with torch.no_grad():
    save_file({"logits": model(torch.tensor([ids])).logits, "ids": torch.tensor(ids)}, out)
assert "qtune" not in sys.modules
"""


@pytest.mark.parametrize("lora", [Lora(rank=4, alpha=8), Lora(rank=4, rslora=True, dora=True)])
def test_loads_without_qtune(lora: Lora, train: Callable[..., Trained], tmp_path: Path) -> None:
    trained = train("qwen2", lora=lora)
    folder = export("adapter", trained, tmp_path / "adapter")
    out = tmp_path / "logits.safetensors"
    command = [sys.executable, "-c", STRANGER, str(folder), str(out)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = load_file(out)
    dense = AutoModelForCausalLM.from_pretrained(trained.base_folder, dtype=torch.float32)
    merged = dict(merged_tensors(trained.base_folder, trained.model, "original"))
    dense.load_state_dict({name: tensor.float() for name, tensor in merged.items()})
    messages = [{"role": "user", "content": "hi"}]
    ids = trained.tokenizer.apply_chat_template(messages, return_dict=False)
    assert found["ids"].tolist() == ids
    with torch.no_grad():
        expected = dense(torch.tensor([ids])).logits
    # what is left is the merge's one rounding to 16 bits
    change = (found["logits"] - expected).norm() / expected.norm()
    assert change < 0.01


def test_config_follows_the_rules_of_servers(train: Callable[..., Trained], tmp_path: Path) -> None:
    trained = train()
    folder = export("adapter", trained, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(trained.base_folder)
    assert (config["r"], config["lora_alpha"], config["bias"]) == (4, 8, "none")
    assert config["init_lora_weights"] is True and config["inference_mode"] is True
    assert not config["use_dora"] and not config["lora_bias"] and not config["modules_to_save"]
    tensors = load_file(folder / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    assert tensors[f"{prefix}.lora_A.weight"].shape == (4, 128)
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in tensors)
    assert trained.model.active_peft_config.base_model_name_or_path != "changed"


def test_base_is_named_as_peft_can_load_it(train: Callable[..., Trained], tmp_path: Path) -> None:
    trained = train()

    def name(model: str) -> str:
        return base_name(replace(trained, recipe=replace(trained.recipe, model=model)))

    (tmp_path / "model.gguf").write_text("")
    assert name("owner/model") == "owner/model"
    assert name(str(tmp_path)) == str(tmp_path)
    assert name(str(tmp_path / "model.gguf")) == str(trained.base_folder)
    assert name("pypi:a==1/b.gguf") == str(trained.base_folder)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_start_is_left_out_of_what_is_written(
    rslora: bool, train: Callable[..., Trained], tmp_path: Path
) -> None:
    trained = train("qwen2", lora=Lora(rank=4, alpha=8, rslora=rslora))
    name = "model.layers.0.mlp.down_proj"
    generator = torch.Generator().manual_seed(2)
    a, b = (0.3 * torch.randn(shape, generator=generator) for shape in ((4, 256), (128, 4)))
    begun = replace(trained, start={name: (a, b)})
    folder = export("adapter", begun, tmp_path / "adapter")
    assert (
        load_file(folder / "adapter_model.safetensors").keys()
        == (
            load_file(export("adapter", trained, tmp_path / "plain") / "adapter_model.safetensors")
        ).keys()
    )
    dense = AutoModelForCausalLM.from_pretrained(trained.base_folder, dtype=torch.float32)
    before = {key: tensor.clone() for key, tensor in dense.state_dict().items()}
    merged = PeftModel.from_pretrained(dense, folder).merge_and_unload().state_dict()
    for key, tensor in merged_tensors(trained.base_folder, trained.model, "original"):
        change = merged[key] - before[key]
        if key == f"{name}.weight":
            change = change + b @ a
        # the merge is rounded to 16 bits
        torch.testing.assert_close(before[key] + change, tensor.float(), rtol=1e-2, atol=4e-3)
    assert begun.model.active_peft_config.r == 4
