"""The tokenizer inside a GGUF file, as tokenizer.json and tokenizer_config.json.

A GGUF file holds vocabulary, merges and token types, but the rule that splits text before the
merges only by name (`tokenizer.ggml.pre`). A wrong rule gives other ids without any error, so the
rules known here are listed and any other name is refused. transformers' own GGUF reader ignores the
name; it is used only for sentencepiece vocabularies (`tokenizer.ggml.model` = llama), which have no
such rule.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from qtune.errors import UserError

# Contractions, words, numbers, punctuation and blanks of the Llama 3 and Qwen 2 families, which
# differ only in how many digits make one piece.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTROL, _USER_DEFINED = 3, 4
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


@dataclass(frozen=True)
class _Splitting:
    """How a family cuts text into the pieces that merges work on."""

    pattern: str | None = None
    """Pieces as a regular expression; none: GPT-2's own."""
    single_digits: bool = False
    """Every digit is a piece, before GPT-2's rule."""
    nfc: bool = False
    """Text is brought to Unicode normal form C first."""
    add_bos: bool = False
    """A BOS is put first where the file does not say."""
    ignore_merges: bool = False
    """A piece that is a token is taken whole."""


_GPT2 = _Splitting()
_DIGITS = _Splitting(single_digits=True)
_LLAMA3 = _Splitting(pattern=_WORDS % "{1,3}", add_bos=True, ignore_merges=True)
_QWEN2 = _Splitting(pattern=_WORDS % "", nfc=True)
_SPLITTING = {
    "gpt-2": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}


def write_tokenizer(meta: Mapping[str, Any], path: Path, folder: Path, max_length: int) -> None:
    """Write the tokenizer of the GGUF file at `path`, whose metadata is `meta`, into `folder`.

    UserError: no tokenizer in the file, or one whose splitting rule is not known here.
    """
    kind = meta.get("tokenizer.ggml.model")
    if kind == "llama":
        _save_sentencepiece(meta, path, folder)
    elif kind == "gpt2":
        byte_pairs(meta, path).save(str(folder / "tokenizer.json"))
        config = _tokenizer_config(meta, max_length)
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    else:
        raise UserError(
            f"{path}: tokenizer.ggml.model is {kind!r}; qtune reads gpt2 and llama tokenizers. Use "
            "the model's safetensors folder instead"
        )


def byte_pairs(meta: Mapping[str, Any], path: Path) -> Tokenizer:
    """Byte-level BPE tokenizer with the splitting rule that `tokenizer.ggml.pre` names."""
    rule = _splitting(meta, path)
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in meta["tokenizer.ggml.merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=rule.ignore_merges))
    if rule.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(rule)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = _post_processor(meta, rule, tokens)
    types = meta.get("tokenizer.ggml.token_type", [])
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, kind in zip(tokens, types, strict=False)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    return tokenizer


def _splitting(meta: Mapping[str, Any], path: Path) -> _Splitting:
    name = meta.get("tokenizer.ggml.pre")
    if name not in _SPLITTING:
        raise UserError(
            f"{path}: tokenizer.ggml.pre is {name!r}, a splitting rule that qtune does not know "
            f"(known: {', '.join(sorted(_SPLITTING))}); guessing would give wrong token ids. Use "
            "the model's safetensors folder instead"
        )
    return _SPLITTING[name]


def _pre_tokenizer(rule: _Splitting) -> pre_tokenizers.PreTokenizer:
    steps: list[pre_tokenizers.PreTokenizer] = []
    if rule.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if rule.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(rule.pattern), "isolated"))
    byte_level = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=rule.pattern is None, trim_offsets=True
    )
    return pre_tokenizers.Sequence([*steps, byte_level])


def _post_processor(
    meta: Mapping[str, Any], rule: _Splitting, tokens: list[str]
) -> processors.PostProcessor:
    byte_level = processors.ByteLevel(trim_offsets=False)
    if not meta.get("tokenizer.ggml.add_bos_token", rule.add_bos):
        return byte_level
    number = meta["tokenizer.ggml.bos_token_id"]
    bos = tokens[number]
    template = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", bos, "$B:1"], special_tokens=[(bos, number)]
    )
    return processors.Sequence([byte_level, template])


def _tokenizer_config(meta: Mapping[str, Any], max_length: int) -> dict[str, Any]:
    tokens = meta["tokenizer.ggml.tokens"]
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    for name, key in _SPECIAL.items():
        number = meta.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None and number < len(tokens):
            config[f"{name}_token"] = tokens[number]
    if "tokenizer.chat_template" in meta:
        config["chat_template"] = meta["tokenizer.chat_template"]
    return config


def _save_sentencepiece(meta: Mapping[str, Any], path: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    # transformers' reader puts a blank before the text whatever the file says.
    if not meta.get("tokenizer.ggml.add_space_prefix", True):
        raise UserError(
            f"{path}: a sentencepiece tokenizer without a blank in front is not known here, and "
            "guessing would give wrong token ids. Use the model's safetensors folder instead"
        )
    AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name).save_pretrained(folder)
