"""Ids with the characters they come from, and the weights that spans give them."""

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qtune.data.tokens import special_tokens, token_weights, tokenise
from qtune.errors import UserError


def test_nothing_is_added_to_the_text(make_tokenizer):
    tokenizer = make_tokenizer("x", bos="<s>", adds_bos=True)
    ids, offsets = tokenise(tokenizer, "Hello there")
    assert ids == tokenizer("Hello there", add_special_tokens=False).input_ids
    assert "".join("Hello there"[a:b] for a, b in offsets) == "Hello there"
    with_bos, _ = tokenise(tokenizer, "Hello there", add_special_tokens=True)
    assert with_bos == [tokenizer.bos_token_id, *ids]


def test_slow_tokenizers_are_refused(tokenizers, monkeypatch):
    monkeypatch.setattr(type(tokenizers["chatml"]), "is_fast", False)
    with pytest.raises(UserError, match="only fast tokenizers"):
        tokenise(tokenizers["chatml"], "a")


def test_special_tokens(tokenizers):
    tokenizer = tokenizers["chatml"]
    special = special_tokens(tokenizer)
    assert special[tokenizer.convert_tokens_to_ids("<|im_end|>")] == "<|im_end|>"
    assert "assistant" not in special.values()


def test_added_special_tokens_are_seen(make_tokenizer):
    tokenizer = make_tokenizer("x")
    assert "<new>" not in special_tokens(tokenizer).values()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]})
    assert "<new>" in special_tokens(tokenizer).values()


def test_weights():
    offsets = [(0, 2), (2, 4), (4, 6), (6, 6), (6, 9)]
    weights = token_weights(range(5), offsets, [(1, 3, 0.5), (3, 5, 2.0), (8, 9, 1.0)], {})
    # the first token is never learned; one with characters of two spans takes the larger weight
    assert weights == [0.0, 2.0, 2.0, 0.0, 1.0]
    assert token_weights(range(5), offsets, [], {}) == [0.0] * 5


def test_special_tokens_count_where_they_begin():
    """Here the header swallows the blanks that the answer begins with."""
    core = Tokenizer(models.WordLevel({"<a>": 0, "hi": 1, "<e>": 2}))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens([AddedToken(t, special=True, rstrip=True) for t in ("<a>", "<e>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    text = "hi<a>  hi<e>\n"
    ids, offsets = tokenise(tokenizer, text)
    assert offsets[1] == (2, 7)
    span = (text.index("  hi"), len(text) - 1, 1.0)
    assert token_weights(ids, offsets, [span], special_tokens(tokenizer)) == [0.0, 0.0, 1.0, 1.0]
    assert token_weights(ids, offsets, [span], {}) == [0.0, 1.0, 1.0, 1.0]
