import json
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qtune.errors import UserError
from qtune.export.gguf_file.splitting import splitting_name


def backend(tokenizer: Tokenizer) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tokenizer.to_str())
    return found


def bytes_only() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2"])
def test_names(name: str, make_tokenizer: Callable[[str], PreTrainedTokenizerFast]) -> None:
    assert splitting_name(backend(make_tokenizer(name).backend_tokenizer)) == name


def test_normal_form_c_may_come_first() -> None:
    tokenizer = bytes_only()
    tokenizer.normalizer = normalizers.NFC()
    assert splitting_name(backend(tokenizer)) == "gpt-2"


def test_unknown_rules_are_refused() -> None:
    lower, blank, split = bytes_only(), bytes_only(), bytes_only()
    lower.normalizer = normalizers.Lowercase()
    blank.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    split.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for tokenizer, word in ((lower, "Lowercase"), (blank, "add_prefix"), (split, "Punctuation")):
        with pytest.raises(UserError, match=rf"{word}.* known are gpt-2"):
            splitting_name(backend(tokenizer))
