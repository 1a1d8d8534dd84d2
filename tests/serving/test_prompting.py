"""Tokenizer and template against what was written of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from qtune.model.load import load_tokenizer
from qtune.serving.prompting import differences


@pytest.fixture
def written(exported: Callable[..., Path]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((exported("bf16") / "qtune.json").read_text())
    return found


@pytest.fixture
def tokenizer(exported: Callable[..., Path]) -> PreTrainedTokenizerBase:
    return load_tokenizer(exported("bf16"))


def told(tokenizer: PreTrainedTokenizerBase, written: dict[str, Any]) -> list[str]:
    return [str(difference) for difference in differences(tokenizer, written)]


def test_nothing_differs(tokenizer: PreTrainedTokenizerBase, written: dict[str, Any]) -> None:
    assert told(tokenizer, written) == []


def test_template_is_told_by_the_first_character_that_differs(
    tokenizer: PreTrainedTokenizerBase, written: dict[str, Any]
) -> None:
    tokenizer.chat_template = "x" + tokenizer.chat_template
    _, first, *_ = told(tokenizer, written)
    assert first.startswith(
        "golden prompt 1: is rendered otherwise from character 1: 'x<|im_start|"
    )
    assert first.endswith("and was '<|im_start|>system\\nR'")


def test_template_that_refuses(tokenizer: PreTrainedTokenizerBase, written: dict[str, Any]) -> None:
    tokenizer.chat_template = "{{ raise_exception('no system') }}"
    assert "golden prompt 1: the chat template refuses it: no system" in told(tokenizer, written)


def test_template_that_is_gone(tokenizer: PreTrainedTokenizerBase, written: dict[str, Any]) -> None:
    tokenizer.chat_template = None
    was = written["template_sha256"][:16]
    assert told(tokenizer, written) == [f"chat template: its SHA-256 is none, and was {was}"]


def test_added_token_and_size_are_told(
    tokenizer: PreTrainedTokenizerBase, written: dict[str, Any]
) -> None:
    size = len(tokenizer.get_vocab())
    tokenizer.add_tokens(["<|new|>"])
    assert told(tokenizer, written) == [
        f"tokenizer: it has {size + 1} tokens, and had {size}",
        f"added tokens: {size} is '<|new|>', and was not there",
    ]


def test_other_tokens_of_a_prompt_are_named(
    tokenizer: PreTrainedTokenizerBase, written: dict[str, Any]
) -> None:
    golden = written["golden"][0]
    was = golden["prompt_ids"][3]
    golden["prompt_ids"][3] = 0
    assert told(tokenizer, written) == [f"golden prompt 1: token 4 has the id {was}, and had 0"]
    golden["prompt_ids"][3:] = []
    (line,) = told(tokenizer, written)
    assert line.endswith("tokens, and had 3")
