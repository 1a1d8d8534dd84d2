import copy
import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from qtune.errors import UserError
from qtune.evaluate.text_perplexity import read_text, text_likelihood, windows

TEXT = "Große Straßen führen nach Rom, sagt man; 3 of them.\n\tAll do.\n" * 2


def loss_of(model, ids, context, stride):
    """In plain words: every token after as many before it as its window begins with."""
    total = 0.0
    for at in range(1, len(ids)):
        # the first window that holds this target ends where strides from the context on lead to
        steps = max(0, math.ceil((at - context) / stride))
        start = max(0, min(context + steps * stride, len(ids) - 1) - context)
        logits = model(input_ids=torch.tensor([ids[start:at]])).logits[0, -1]
        total += cross_entropy(logits.double(), torch.tensor(ids[at])).item()
    return total


@pytest.mark.parametrize(("context", "stride"), [(64, None), (64, 16), (9, 1), (256, 100)])
def test_every_token_counts_once_after_what_its_window_holds(model, tokenizer, context, stride):
    ids = [tokenizer.eos_token_id, *tokenizer(TEXT)["input_ids"]]
    found = text_likelihood(model, tokenizer, TEXT, file="x", context=context, stride=stride)
    with torch.no_grad():
        expected = loss_of(model, ids, context, stride or context)
    assert found.nats == pytest.approx(expected, rel=1e-5)
    assert found.tokens == len(ids) - 1 == len(TEXT.encode())


@pytest.mark.parametrize(("length", "context", "stride"), [(2, 8, 8), (9, 8, 3), (50, 8, 8)])
def test_windows_cover_all_targets_in_order(length, context, stride):
    ids = torch.arange(length)
    rows = list(windows(ids, context, stride))
    assert torch.cat([targets for _, targets in rows]).tolist() == list(range(1, length))
    for row, targets in rows:
        assert len(row) <= context and row[-1] == targets[-1] - 1
        assert len(row) >= len(targets)
    for row, targets in rows[1:]:
        assert len(row) == context and len(targets) <= stride


def test_units_are_those_of_the_text(model, tokenizer):
    found = text_likelihood(model, tokenizer, TEXT, file="x", context=64)
    assert (found.words, found.bytes) == (len(TEXT.split()), len(TEXT.encode()))
    assert found.bits_per_byte == pytest.approx(found.nats / math.log(2) / len(TEXT.encode()))
    assert found.word_perplexity == pytest.approx(math.exp(found.nats / len(TEXT.split())))
    # one token per byte here
    assert found.bits_per_byte == pytest.approx(math.log2(found.perplexity))


def test_it_is_that_of_the_harness(model, tokenizer):
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    lm = huggingface.HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), max_length=64)
    request = Instance("loglikelihood_rolling", {}, (TEXT,), 0)
    (expected,) = lm.loglikelihood_rolling([request], disable_tqdm=True)
    found = text_likelihood(model, tokenizer, TEXT, file="x", context=64)
    # its last window reaches back to be a full one, and so knows more of the last tokens
    assert found.nats == pytest.approx(-expected, rel=0.02)


def test_a_context_beyond_the_models_positions_is_cut(model, tokenizer):
    found = text_likelihood(model, tokenizer, TEXT, file="x", context=9999, stride=5000)
    assert (found.context, found.stride) == (256, 256)


def test_progress_counts_all_tokens(model, tokenizer):
    seen = []
    found = text_likelihood(
        model, tokenizer, TEXT, file="x", context=32, stride=20, on_progress=seen.append
    )
    assert sum(seen) == found.tokens


def test_a_tokenizer_without_a_start_is_refused(model, tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.eos_token = None
    with pytest.raises(UserError, match="neither a start nor an end token"):
        text_likelihood(model, bare, TEXT, file="x", context=32)


def test_files_that_hold_no_text(tmp_path: Path):
    path = tmp_path / "a.txt"
    with pytest.raises(UserError, match=r"a\.txt: No such file"):
        read_text(path)
    path.write_bytes("ä".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        read_text(path)
    path.write_text(" \n")
    with pytest.raises(UserError, match="holds no text"):
        read_text(path)
    path.write_text("word", encoding="utf-8")
    assert read_text(path) == "word"
