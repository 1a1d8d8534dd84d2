"""A folder that is quantized once holds what loading would have made, bit for bit."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig

from qtune.errors import UserError
from qtune.model import prequantized
from qtune.model.load import load_base
from qtune.quant.linear import QuantLinear
from qtune.recipe import Calibration, Quant

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QTUNE_CACHE", str(tmp_path / "cache"))


def quantized_folder(folder, quant, **options):
    return prequantized.quantized_folder(folder, quant, device=CPU, **options)


def same(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(
        a.dtype == theirs[name].dtype and torch.equal(a, theirs[name]) for name, a in ours.items()
    )


@pytest.mark.parametrize(
    "quant", [Quant(), Quant(format="int8", group_size=32, skip=("lm_head", "q_proj"))]
)
def test_folder_loads_as_the_model_that_quantizing_while_loading_makes(tiny_model, quant):
    folder = quantized_folder(tiny_model, quant)
    model = load_base(folder, quant, device=CPU)
    assert same(model, load_base(tiny_model, quant, device=CPU))
    dense = [m for m in model.modules() if type(m) is torch.nn.Linear]
    assert len(dense) == (1 if quant.format == "nf4" else 3)
    # the tied head is stored once
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")


def test_experts_are_merged_and_quantized(tmp_path):
    config = MixtralConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        vocab_size=64,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "mixtral")
    folder = quantized_folder(tmp_path / "mixtral", Quant())
    found = load_base(folder, Quant(), device=CPU)
    expected = load_base(tmp_path / "mixtral", Quant(), device=CPU)
    assert same(found, expected)
    assert any("expert" in n for n, m in found.named_modules() if isinstance(m, QuantLinear))


def test_it_is_made_once_and_again_when_something_changes(tiny_model, monkeypatch):
    made = []
    write = prequantized._write
    monkeypatch.setattr(prequantized, "_write", lambda *a, **k: made.append(a) or write(*a, **k))
    first = quantized_folder(tiny_model, Quant())
    assert quantized_folder(tiny_model, Quant()) == first and len(made) == 1
    others = [
        quantized_folder(tiny_model, Quant(group_size=32)),
        quantized_folder(tiny_model, Quant(skip=("lm_head", "k_proj"))),
        quantized_folder(tiny_model, Quant(), dtype=torch.float16),
    ]
    weights = tiny_model / "model.safetensors"
    status = weights.stat()
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    others.append(quantized_folder(tiny_model, Quant()))
    assert len({first, *others}) == 5 == len(made)


def test_nothing_to_quantize_gives_the_folder_back(tiny_model):
    assert quantized_folder(tiny_model, Quant(format=None)) == tiny_model
    quantized = quantized_folder(tiny_model, Quant())
    assert quantized_folder(quantized, Quant()) == quantized


def test_shards_are_written_while_weights_come_in(tiny_model, monkeypatch):
    monkeypatch.setattr(prequantized, "SHARD_BYTES", 20_000)
    folder = quantized_folder(tiny_model, Quant())
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    model = load_base(folder, Quant(), device=CPU)
    assert same(model, load_base(tiny_model, Quant(), device=CPU))


def test_loading_is_as_usual_behind_it(tiny_model):
    quantized_folder(tiny_model, Quant())
    model = load_base(tiny_model, Quant(), device=CPU)
    assert not any(p.is_meta for p in model.parameters())


def test_method_that_needs_text_is_refused(tiny_model):
    with pytest.raises(UserError, match="gptq measures the model on text"):
        quantized_folder(tiny_model, Quant(method="gptq"))


def test_what_concerns_text_alone_makes_no_other_folder(tiny_model):
    other = Quant(calibration=Calibration(tokens=99))
    assert quantized_folder(tiny_model, other) == quantized_folder(tiny_model, Quant())


def test_incomplete_model_is_named_and_leaves_nothing(tiny_model, tmp_path):
    from safetensors.torch import save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((tiny_model / "config.json").read_text())
    tensors = load_file(tiny_model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 4 of .*as model\.layers\.1\.mlp\.up_proj"):
        quantized_folder(broken, Quant())
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
