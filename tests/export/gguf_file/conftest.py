"""Small tokenizers of the kinds that llama.cpp has, and a GGUF file with little else in it."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qtune.export.gguf_file.mixes import MIXES
from qtune.export.gguf_file.write import Described, write_model

BLANK = "\N{LOWER ONE EIGHTH BLOCK}"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
TEXTS = [
    "I've told you: they'RE here, she'll come at 10:45 on 2024-12-31, won't she?",
    "the the them then these those  this   that    and\n\nand\r\n\tand 12345678 1 22 333 4444",
    "def f(x):\n    return {'a': x ** 2, \"b\": [x] * 3}  # ok!!! ...\n",
    "żółć naïve Ελλάδα привет мир 日本語テキスト 한국어 😀 👩‍👩‍👧 €100 ½ ² Ⅷ",
]
SIZE = 600


def byte_level(
    *steps: pre_tokenizers.PreTokenizer, words: bool = True, ignore_merges: bool = False
) -> Tokenizer:
    """A tokenizer for which every rule of splitting matters.

    It has learned merges from text that was not split, and a third of its last tokens come of none:
    they are found only as whole pieces.
    """
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=550, initial_alphabet=alphabet, show_progress=False, special_tokens=special
    )
    pieces = [piece for text in TEXTS for piece in (text, *text.split(), *text.split(" "))]
    learned.train_from_iterator(pieces * 3, trainer)
    model = json.loads(learned.to_str())["model"]
    merges = [tuple(merge) for i, merge in enumerate(model["merges"]) if i < 150 or i % 3]
    tokenizer = Tokenizer(models.BPE(model["vocab"], merges, ignore_merges=ignore_merges))
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, last])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*special, AddedToken("<|im_end|>", special=True)])
    tokenizer.add_tokens([AddedToken("<tool>")])
    return tokenizer


def _cut(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def sentencepiece(in_front: str) -> Tokenizer:
    """As transformers has SentencePiece models: merges over blanks, and bytes for what is left.

    A blank is put in front of each part of a text between special tokens (`always`), of the first
    one (`first`) or nowhere (`never`).
    """
    learned = Tokenizer(models.BPE())
    learned.normalizer = normalizers.Replace(" ", BLANK)
    learned.pre_tokenizer = pre_tokenizers.Split(BLANK, "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=250, show_progress=False)
    learned.train_from_iterator([f" {text}" for text in TEXTS[:3]] * 3, trainer)
    backend = json.loads(learned.to_str())["model"]
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names = [*first, *backend["vocab"]]
    tokenizer = Tokenizer(
        models.BPE(
            {name: number for number, name in enumerate(names)},
            [tuple(merge) for merge in backend["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    if in_front == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        steps = [normalizers.Prepend(BLANK)] if in_front == "always" else []
        tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", BLANK)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["<s>", "$A"], special_tokens=[("<s>", 1)]
    )
    special = ["<unk>", "<s>", "</s>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return tokenizer


def _llama3() -> Tokenizer:
    tokenizer = byte_level(_cut(LLAMA3), words=False, ignore_merges=True)
    bos = [("<s>", 0)]
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=bos)
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "gpt-2": byte_level,
    "smollm": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True)),
    "llama-bpe": _llama3,
    "dbrx": lambda: byte_level(_cut(LLAMA3), words=False),
    "qwen2": lambda: byte_level(_cut(QWEN2), words=False),
    "blank in front": lambda: sentencepiece("always"),
    "no blank in front": lambda: sentencepiece("never"),
    "one blank in front": lambda: sentencepiece("first"),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """A kind of tokenizer: llama.cpp's name for its splitting, or how blanks are treated."""
    found: str = request.param
    return found


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[[str], PreTrainedTokenizerFast]:
    """A maker of tokenizers by their kinds."""

    @cache
    def make(kind: str) -> PreTrainedTokenizerFast:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=KINDS[kind](), bos_token="<s>", eos_token="</s>"
        )
        tokenizer.chat_template = "{{ messages[0]['content'] }}<|im_end|>"
        return tokenizer

    return make


@pytest.fixture
def write_vocabulary(
    make_tokenizer: Callable[[str], PreTrainedTokenizerFast], tmp_path: Path
) -> Callable[[str], Path]:
    """Writes a random model of one block with the tokenizer of a kind; the path of the file."""

    def write(kind: str) -> Path:
        tokenizer = make_tokenizer(kind)
        config = LlamaConfig(
            hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            vocab_size=SIZE, max_position_embeddings=64, tie_word_embeddings=True,
        )  # fmt: skip
        tensors = LlamaForCausalLM(config).state_dict()
        del tensors["lm_head.weight"]
        stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
        described = Described(kind, config, tokenizer, stops, tied=True)
        write_model(tmp_path / "model.gguf", tensors.items(), described, MIXES["f16"])
        return tmp_path / "model.gguf"

    return write
