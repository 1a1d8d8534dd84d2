"""Loading through transformers against the dense model, quantized layer by layer."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qtune.errors import UserError
from qtune.model import load, quantizer
from qtune.model.fused import fuse
from qtune.model.quantizer import QtuneConfig, quantized_on_meta
from qtune.quant.format import format_names
from qtune.quant.linear import QuantLinear
from qtune.quant.storage import Storage
from qtune.quant.vector_linear import layer_type

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 100,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(autouse=True)
def registered() -> None:
    load.register()


def save_dense(folder: Path, family: str = "llama", **settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**{**SMALL, **settings})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder, max_shard_size="40KB")
    return model.eval()


def read(folder: Path, config: QtuneConfig | None = None, **options: Any) -> PreTrainedModel:
    options = {"dtype": torch.bfloat16, **options}
    if config is not None:
        options["quantization_config"] = config
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def logits(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(3, 15).unsqueeze(0)
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


@pytest.mark.parametrize("name", format_names())
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_packs_what_from_linear_packs(tmp_path: Path, family: str, name: str) -> None:
    # a word of e8p is for eight weights of a row
    dense = save_dense(tmp_path, family, intermediate_size=104 if name == "e8p" else 100)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model = read(tmp_path, QtuneConfig(format=name))
    packed = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert len(packed) == 14
    for layer_name, layer in packed.items():
        storage = Storage(name)
        expected = layer_type(storage).from_linear(dense.get_submodule(layer_name), storage)
        for key, tensor in expected.state_dict().items():
            assert torch.equal(layer.state_dict()[key], tensor), (layer_name, key)
        dense.set_submodule(layer_name, expected)
    fuse(dense)
    assert torch.equal(logits(model), logits(dense))


@pytest.mark.parametrize("tied", [True, False])
def test_saved_model_loads_again_bit_for_bit(tmp_path: Path, tied: bool) -> None:
    save_dense(tmp_path / "dense", tie_word_embeddings=tied, attention_bias=True)
    model = read(tmp_path / "dense", QtuneConfig())
    model.save_pretrained(tmp_path / "packed")
    settings = json.loads((tmp_path / "packed/config.json").read_text())["quantization_config"]
    assert settings.pop("skip") == ["lm_head"]
    assert settings.items() >= {"quant_method": "qtune", "format": "nf4", "group_size": 64}.items()
    again = read(tmp_path / "packed")
    state, state_again = model.state_dict(), again.state_dict()
    assert state.keys() == state_again.keys()
    assert all(torch.equal(state[key], state_again[key]) for key in state)
    assert torch.equal(logits(model), logits(again))
    head, embedding = again.lm_head.weight, again.get_input_embeddings().weight
    assert (head is embedding) == tied


def test_saved_model_loads_after_nothing_but_import_qtune(tmp_path: Path) -> None:
    save_dense(tmp_path / "dense")
    model = read(tmp_path / "dense", QtuneConfig())
    model.save_pretrained(tmp_path / "packed")
    code = (
        "import sys, qtune, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)\n"
        "ids = torch.arange(3, 15).unsqueeze(0)\n"
        "print(float(model(input_ids=ids).logits.float().sum()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "packed")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(float(logits(model).float().sum()))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("skip", [None, [], ["q_proj", "down_proj"]])
def test_output_layer_is_never_quantized(
    tmp_path: Path, skip: list[str] | None, tied: bool
) -> None:
    dense = save_dense(tmp_path, tie_word_embeddings=tied)
    model = read(tmp_path, QtuneConfig(skip=skip))
    assert type(model.lm_head) is nn.Linear
    assert torch.equal(model.lm_head.weight, dense.lm_head.weight)
    kept = {n.rsplit(".")[-1] for n, m in model.named_modules() if type(m) is nn.Linear}
    assert kept == {"lm_head", *(skip or [])}


def test_output_layer_of_another_name(tmp_path: Path) -> None:
    save_dense(tmp_path, "gpt_neox")
    model = read(tmp_path, QtuneConfig())
    assert type(model.get_output_embeddings()) is nn.Linear


def test_everything_is_frozen_but_what_stays_dense(tmp_path: Path) -> None:
    save_dense(tmp_path)
    model = read(tmp_path, QtuneConfig())
    names = {n for n, p in model.named_parameters() if p.dtype == torch.uint8}
    assert len(names) == 14 * 4
    assert not any(dict(model.named_parameters())[name].requires_grad for name in names)
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_casting_the_model_leaves_codes_alone(tmp_path: Path) -> None:
    save_dense(tmp_path)
    model = read(tmp_path, QtuneConfig())
    before = {n: p.clone() for n, p in model.named_parameters() if p.dtype == torch.uint8}
    model.to(torch.float32)
    after = dict(model.named_parameters())
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert logits(model).dtype == torch.float32


def test_generates(tmp_path: Path) -> None:
    save_dense(tmp_path)
    model = read(tmp_path, QtuneConfig())
    ids = torch.tensor([[3, 4, 5]])
    options = {"max_new_tokens": 4, "do_sample": False}
    made = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    best = logits_after(model, made[0, :-1].tolist())
    assert made.shape[1] <= 7 and int(made[0, -1]) == best


def logits_after(model: nn.Module, ids: list[int]) -> int:
    with torch.no_grad():
        return int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())


def test_same_layers_on_meta(tmp_path: Path) -> None:
    save_dense(tmp_path)
    model = read(tmp_path, QtuneConfig())
    with torch.device("meta"):
        planned = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    quantized_on_meta(planned, QtuneConfig())
    shapes = {name: (p.shape, p.dtype) for name, p in model.named_parameters()}
    assert {name: (p.shape, p.dtype) for name, p in planned.named_parameters()} == shapes


def test_group_size_that_fits_no_layer(tmp_path: Path) -> None:
    save_dense(tmp_path)
    with pytest.raises(
        UserError, match=r"group_size \(128\) fits no layer: .* 100 weights; use 64"
    ):
        read(tmp_path, QtuneConfig(group_size=128))


def test_every_layer_is_stored_as_the_configuration_says(tmp_path: Path) -> None:
    dense = save_dense(tmp_path)
    layers = {"down_proj": {"format": "int2", "group_size": 32}, "layers.1.mlp": {"rotated": True}}
    config = QtuneConfig("int4", layers=layers)
    model = read(tmp_path, config)
    packed = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert {n: m.storage for n, m in packed.items()} == {n: config.storage(n) for n in packed}
    for name, layer in packed.items():
        expected = QuantLinear.from_linear(dense.get_submodule(name), config.storage(name))
        assert torch.equal(layer.dequantize(), expected.dequantize())
    model.save_pretrained(tmp_path / "packed")
    assert torch.equal(logits(read(tmp_path / "packed")), logits(model))


def test_model_without_linear_layers() -> None:
    config = GPT2Config(vocab_size=97, n_embd=64, n_layer=1, n_head=4)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match="no linear layer that could be quantized"):
        quantized_on_meta(model, QtuneConfig())


def test_registering_twice() -> None:
    quantizer.register()
    quantizer.register()


def test_weights_handed_over_in_memory_survive(tmp_path: Path) -> None:
    # pages of a mapped shard are given back; those of a tensor that lies in no file must not be
    dense = save_dense(tmp_path)
    state = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    before = {name: tensor.clone() for name, tensor in state.items()}
    options = {"quantization_config": QtuneConfig(), "dtype": torch.bfloat16}
    LlamaForCausalLM.from_pretrained(None, config=dense.config, state_dict=state, **options)
    assert all(torch.equal(state[name], before[name]) for name in state)


def test_releasing_pages_loses_nothing(tmp_path: Path) -> None:
    private = torch.randn(1 << 16)
    copy = private.clone()
    quantizer.release_pages(private)
    assert torch.equal(private, copy)
    save_dense(tmp_path, hidden_size=128, intermediate_size=512)
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                mapped = shard.get_tensor(name)
                copy = mapped.clone()
                quantizer.release_pages(mapped)
                assert torch.equal(mapped, copy)


PEAK = """
import gc, re, sys
from pathlib import Path
import torch
from torch import nn
torch.set_num_threads(1)
from qtune.model import load
load.register()
from transformers import AutoModelForCausalLM
from qtune.model.quantizer import QtuneConfig
STATUS = Path("/proc/self/status")

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", STATUS.read_text())[1]) * 1024

from qtune.quant import weight
most = [0]
plain = weight.encode
def watched(*args):
    most[0] = max(most[0], anonymous())
    return plain(*args)
weight.encode = watched

def load(folder):
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=QtuneConfig()
    )

# what the libraries import and set up once does not count
load(sys.argv[1])
gc.collect()
most[0] = before = anonymous()
model = load(sys.argv[2])
held = sum(p.nbytes for p in model.parameters())
print(max(most[0], anonymous()) - before, held)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_the_packed_size_and_the_largest_tensor(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=4096, num_hidden_layers=3,
        num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.view(torch.int16).random_(15000, 15500)
    model.save_pretrained(tmp_path / "large", max_shard_size="30MB")
    dense = sum(parameter.nbytes for parameter in model.parameters())
    largest = max(parameter.nbytes for parameter in model.parameters())
    assert dense > 100e6
    del model
    save_dense(tmp_path / "small")
    folders = [str(tmp_path / "small"), str(tmp_path / "large")]
    done = subprocess.run([sys.executable, "-c", PEAK, *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak, held = (int(word) for word in done.stdout.split()[-2:])
    assert held < 0.31 * dense
    assert peak <= 1.5 * (held + largest)
