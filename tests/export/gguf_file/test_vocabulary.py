import json
from collections.abc import Callable
from typing import Any

import pytest
from gguf import TokenType
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qtune.errors import UserError
from qtune.export.gguf_file.vocabulary import vocabulary


def backend(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return found


def test_byte_level(make_tokenizer: Callable[[str], PreTrainedTokenizerFast]) -> None:
    tokenizer = make_tokenizer("gpt-2")
    found = vocabulary(backend(tokenizer), 600)
    assert (found.kind, found.splitting, found.scores) == ("gpt2", "gpt-2", None)
    assert [found.texts.index(text) for text in ("<s>", "the")] == tokenizer.convert_tokens_to_ids(
        ["<s>", "the"]
    )
    assert found.types[found.texts.index("<|im_end|>")] == TokenType.CONTROL
    assert found.types[found.texts.index("<tool>")] == TokenType.USER_DEFINED
    assert found.types[found.texts.index("the")] == TokenType.NORMAL
    assert (found.texts[599], found.types[599]) == ("[PAD599]", TokenType.UNUSED)
    assert found.merges is not None
    assert [tuple(merge.split()) for merge in found.merges] == [
        tuple(merge) for merge in backend(tokenizer)["model"]["merges"]
    ]


def test_sentencepiece(make_tokenizer: Callable[[str], PreTrainedTokenizerFast]) -> None:
    found = vocabulary(backend(make_tokenizer("blank in front")), 600)
    assert (found.kind, found.splitting, found.merges) == ("llama", "default", None)
    assert found.blank_in_front is True and found.scores is not None
    assert found.types[:5] == [
        TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, TokenType.BYTE, TokenType.BYTE,
    ]  # fmt: skip
    first, second = backend(make_tokenizer("blank in front"))["model"]["merges"][:2]
    scores = [found.scores[found.texts.index("".join(pair))] for pair in (first, second)]
    assert scores == [0, -1] and min(found.scores) < -1e8
    assert vocabulary(backend(make_tokenizer("no blank in front")), 600).blank_in_front is False
    once = backend(make_tokenizer("one blank in front"))
    assert vocabulary(once, 600).blank_in_front is True
    assert vocabulary(once, 600, chats=True).blank_in_front is False


def test_what_llamacpp_has_not_is_refused(
    make_tokenizer: Callable[[str], PreTrainedTokenizerFast],
) -> None:
    unigram = Tokenizer(models.Unigram([("a", 0.0)]))
    with pytest.raises(UserError, match="of the type Unigram"):
        vocabulary(json.loads(unigram.to_str()), 600)
    with pytest.raises(UserError, match="only 300 embeddings"):
        vocabulary(backend(make_tokenizer("gpt-2")), 300)
    no_merges = Tokenizer(models.BPE({"a": 0}, []))
    no_merges.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    with pytest.raises(UserError, match="merges nothing"):
        vocabulary(json.loads(no_merges.to_str()), 600)
