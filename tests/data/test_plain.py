"""Texts without a conversation, against ids put together by hand."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from qtune.data.plain import encode_plain, split, text_ids
from qtune.data.sample import Sample
from qtune.errors import UserError


@pytest.fixture
def blank_first():
    """Puts a blank before any text, and BOS and EOS around it, as T5 and old Llamas do."""
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *"▁abc\n"])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Replace("▁", " ")
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def texts(*contents):
    return [{"role": "assistant", "content": content} for content in contents]


def test_bos_as_the_tokenizer_does_and_eos_learned(make_tokenizer):
    for adds_bos in (True, False):
        tokenizer = make_tokenizer("x", bos="<s>", adds_bos=adds_bos)
        sample = encode_plain(tokenizer, "a.txt:1", texts("Hello there"), [1.0])
        body = tokenizer("Hello there", add_special_tokens=False).input_ids
        bos = [tokenizer.bos_token_id] if adds_bos else []
        assert sample.ids == [*bos, *body, tokenizer.eos_token_id]
        assert sample.weights == [0.0] + [1.0] * (len(sample.ids) - 1)
        assert sample.place == "a.txt:1"


def test_an_end_that_the_tokenizer_adds_comes_once(blank_first):
    sample = encode_plain(blank_first, "a", texts("ab c"), [1.0])
    assert blank_first.convert_ids_to_tokens(sample.ids) == [
        "<s>", "▁", "a", "b", "▁", "c", "</s>"
    ]  # fmt: skip


def test_no_blank_is_put_between_prompt_and_answer(blank_first):
    sample = encode_plain(blank_first, "a", texts("ab", "cab"), [0.0, 0.5])
    tokens = blank_first.convert_ids_to_tokens(sample.ids)
    assert tokens == ["<s>", "▁", "a", "b", "c", "a", "b", "</s>"]
    assert sample.weights == [0.0] * 4 + [0.5] * 4
    assert text_ids(blank_first, ["ab"])[0] == sample.ids[:4]


@pytest.mark.parametrize("answer", [" four", "four", "\n\nfour", ""])
def test_ids_of_a_prompt_do_not_depend_on_the_answer(answer, make_tokenizer):
    tokenizer = make_tokenizer("x")
    prompt, rest = text_ids(tokenizer, ["What is two plus two? ", answer])
    assert prompt == tokenizer("What is two plus two? ").input_ids
    assert tokenizer.decode(prompt + rest) == "What is two plus two? " + answer


def test_no_end_token(make_tokenizer):
    tokenizer = make_tokenizer("x")
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"a\.txt:1: the tokenizer has no end token"):
        encode_plain(tokenizer, "a.txt:1", texts("Hello"), [1.0])


@pytest.mark.parametrize("length", [2, 3, 9, 10, 11, 30])
@pytest.mark.parametrize("bos", [None, 100])
def test_split_learns_each_token_once(length, bos):
    ids = ([] if bos is None else [bos]) + list(range(length))
    weights = [0.0] + [i / 100 for i in ids[1:]]
    pieces = split(Sample("a", ids, weights), 10, bos)
    assert all(len(piece.ids) <= 10 and piece.weights[0] == 0 for piece in pieces)
    learned = [pair for p in pieces for pair in list(zip(p.ids, p.weights, strict=True))[1:]]
    assert learned == list(zip(ids, weights, strict=True))[1:]
    leads = [piece.ids[0] for piece in pieces]
    ends = [ids[0], *(piece.ids[-1] for piece in pieces[:-1])]
    assert leads == (ends if bos is None else [bos] * len(pieces))
