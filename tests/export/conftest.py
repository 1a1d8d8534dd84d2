"""Tiny models that were trained, in the sense that their adapters are not zero."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from qtune.export.exporter import Trained
from qtune.model.load import add_adapter, load_base, load_tokenizer
from qtune.recipe import Data, Lora, Quant, Recipe, Train

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 128,
    "dtype": "bfloat16",
}
FAMILIES = {
    "llama": LlamaConfig(tie_word_embeddings=True, **SIZES),
    "qwen2": Qwen2Config(tie_word_embeddings=False, **SIZES),
}
CPU = torch.device("cpu")


def make_tokenizer() -> PreTrainedTokenizerBase:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # a merge, for llama.cpp knows no byte-level tokenizer without any
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet, "th"])}
    backend = Tokenizer(models.BPE(vocab, [("t", "h")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", bos_token="<|im_start|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write_model(folder: Path, family: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A folder with a random model whose weights are large enough for a wrong one to show."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family], dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.normal_(1, 0.1)
            elif weight.ndim == 1:
                weight.normal_(0, 0.1)
            else:
                weight.mul_(4)
    model.to(dtype).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "LICENSE").write_text("do what you like\n")
    return folder


def shake(model: PeftModel, scale: float = 0.05) -> PeftModel:
    """The model with an adapter as if it had been trained: nothing in it is zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad and "magnitude" in name:
                weight.mul_(1 + 0.1 * torch.rand_like(weight))
            elif weight.requires_grad:
                weight.add_(scale * torch.randn_like(weight))
    return model.eval()


def make_recipe(base: Path, run: Path, **parts: Any) -> Recipe:
    data, train = Data(train="demo:train"), Train(steps=1)
    return Recipe(model=str(base), data=data, train=train, run=run, **parts)


@pytest.fixture(scope="session")
def write_base() -> Callable[..., Path]:
    return write_model


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {family: write_model(root / family, family) for family in FAMILIES}


@pytest.fixture(scope="session")
def train(
    bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Trained]:
    """A maker of trained models; `Trained` has the fields to change afterwards."""

    def make(
        family: str = "llama", quant: Quant | None = None, lora: Lora | None = None, **parts: Any
    ) -> Trained:
        base, quant = parts.pop("base", bases[family]), quant or Quant()
        lora = lora or Lora(rank=4, alpha=8)
        recipe = make_recipe(base, tmp_path_factory.mktemp("run"), quant=quant, lora=lora)
        model = shake(add_adapter(load_base(base, quant, device=CPU), lora))
        return replace(Trained(recipe, model, load_tokenizer(base), base), **parts)

    return make


@pytest.fixture(scope="session")
def rows() -> list[list[int]]:
    torch.manual_seed(2)
    return [torch.randint(3, 259, (size,)).tolist() for size in (9, 17)]
