"""A tiny real model with a tokenizer, and a recipe that trains it in seconds."""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

# before torch and the libraries are imported: they read these once
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "offline"

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qtune.data import demo
from qtune.recipe import Data, Evaluate, Lora, Recipe, Train

torch.set_num_threads(1)
# support modules lie beside the tests, and folders of tests are no packages
sys.path.insert(0, str(Path(__file__).parent))
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = 512


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing a test fetches or converts reaches the user's cache."""
    monkeypatch.setenv("QTUNE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random Llama of two blocks whose tokenizer knows the demo's words."""
    folder = tmp_path_factory.mktemp("tiny") / "llama"
    tokenizer = _tokenizer()
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_recipe(tiny_model: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """A maker of recipes: keywords replace fields of the section they belong to."""

    def make(**fields: Any) -> Recipe:
        recipe = Recipe(
            model=str(tiny_model),
            data=Data(
                train="demo:train?rows=12",
                validation="demo:validation?rows=4",
                test="demo:test?rows=2",
                max_length=512,
            ),
            lora=Lora(rank=4, alpha=8),
            train=Train(steps=4, batch_size=4, lr=1e-2, eval_every=2, save_every=2),
            evaluate=Evaluate(metric="json_match", max_new_tokens=2),
            export=("adapter",),
            run=tmp_path / "run",
        )
        return _with_fields(recipe, fields)

    return make


def _with_fields(recipe: Recipe, fields: dict[str, Any]) -> Recipe:
    """The recipe with `section={...}` laid over that section and other values put in."""
    new = {
        name: replace(getattr(recipe, name), **value) if isinstance(value, dict) else value
        for name, value in fields.items()
    }
    return replace(recipe, **new)


def _tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [m["content"] for row in demo.rows("train", 60) for m in row["messages"]]
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer
