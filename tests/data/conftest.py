"""Tokenizers with chat templates in the styles of several model families, small but real."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerFast

from qtune.data.rows import Row

SENTENCES = [
    "Hello! How can I help you today?",
    "What is two plus two? It is four.",
    "The train to Berlin costs 48.50 euros.",
    "user assistant system thinking model",
    "Answer briefly, please. Thanks a lot.",
]

SPECIAL = [
    *("<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>"),
    *("<|end_header_id|>", "<|eot_id|>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    *("<s>", "</s>", "[INST]", "[/INST]", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
]


@dataclass(frozen=True)
class Family:
    """A chat template and the special tokens that go with it."""

    template: str
    bos: str | None
    eos: str


FAMILIES = {
    "chatml": Family(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        bos="<|im_start|>",
        eos="<|im_end|>",
    ),
    "headers": Family(
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n"
        "{% endif %}",
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
    ),
    "gemma": Family(
        "{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        bos="<bos>",
        eos="<eos>",
    ),
    "inst": Family(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} "
        "[/INST]{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}",
        bos="<s>",
        eos="</s>",
    ),
    # The end-of-text token comes once, behind the whole conversation: no prefix difference.
    "end_once": Family(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        bos=None,
        eos="<|endoftext|>",
    ),
    # The markers leave the terminator out, as some published templates do.
    "markers": Family(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{%- generation -%}{{ m.content }}{%- endgeneration -%}{% else %}{{ m.content }}{% endif %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        bos=None,
        eos="<|im_end|>",
    ),
    # Thoughts of earlier turns are dropped; the last turn always gets a thinking block.
    "thinking": Family(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% set text = m.content.split('</think>')[-1].lstrip('\n') %}"
        "{% if m.role == 'assistant' and loop.last %}"
        "<think>\n{{ m.content.split('</think>')[0].split('<think>')[-1].strip('\n')"
        " if '</think>' in m.content else '' }}\n</think>\n\n{% endif %}"
        "{{ text }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        bos=None,
        eos="<|im_end|>",
    ),
}


def byte_level(adds_bos: str | None) -> Tokenizer:
    """A byte-level BPE of a few hundred tokens, like those of GPT-2, Llama 3 and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{adds_bos} $A", special_tokens=[(adds_bos, tokenizer.token_to_id(adds_bos))]
        )
    return tokenizer


def build(family: Family, *, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer with the family's template; padding is the end token, as in many models."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(family.bos if adds_bos else None),
        bos_token=family.bos,
        eos_token=family.eos,
        pad_token=family.eos,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = family.template
    return tokenizer


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """One tokenizer per family."""
    return {name: build(family) for name, family in FAMILIES.items()}


@pytest.fixture
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """A tokenizer with another template, for tests that change it."""

    def make(
        template: str, *, bos: str | None = None, eos: str = "</s>", adds_bos: bool = False
    ) -> PreTrainedTokenizerFast:
        return build(Family(template, bos, eos), adds_bos=adds_bos)

    return make


@pytest.fixture
def row() -> Callable[..., Row]:
    """A row from alternating user and assistant texts."""

    def make(*texts: str, system: str | None = None, number: int = 1) -> Row:
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
        if system:
            messages.insert(0, {"role": "system", "content": system})
        return Row("train.jsonl", number, messages)

    return make


@pytest.fixture
def tokenizer(tokenizers):
    """The one with ChatML."""
    return tokenizers["chatml"]


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("QTUNE_CACHE", str(tmp_path / "cache"))
