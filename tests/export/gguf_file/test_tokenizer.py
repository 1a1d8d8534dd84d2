from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from qtune.errors import UserError
from qtune.export.gguf_file.tokenizer import add_tokenizer

AWKWARD = [
    "", " ", "   ", "\n", "\n\n \n\t\t x", "a", "  two blanks", "trailing   ",
    "don't they'LL I'm", "0 12 345 6789 00000", "x=1;y=[2,3];# '''\"\"\"", "tab\tnew\r\nline",
    "no\N{NO-BREAK SPACE}break", "\N{EM DASH}\N{LEFT DOUBLE QUOTATION MARK}", "ﬁ ½ ² Ⅷ",
    "日本語 and 한국어", "😀👩‍👩‍👧", "Ünïcödé ΣΙΓΜΑ", "<tool>x<tool> y", "a<|im_end|>\nb",
    "the these those them", "http://a.b/c?d=e&f", "A" * 40,
]  # fmt: skip

WORDS = [
    "I've told you: they'RE here at 10:45 on 2024-12-31",
    " {'a': x ** 2}\n ok!!! ...\n",
    "привет мир",
]


def test_llamacpp_gives_the_same_ids(
    kind: str,
    make_tokenizer: Callable[[str], PreTrainedTokenizerFast],
    write_vocabulary: Callable[[str], Path],
) -> None:
    """For text that rules of splitting disagree on, with what is put around it."""
    pytest.importorskip("xllamacpp")
    from qtune.export.consumers.llama_file import LlamaFile

    tokenizer, file = make_tokenizer(kind), LlamaFile(write_vocabulary(kind))
    words = [word for text in AWKWARD for word in text.split()]
    # where llama.cpp has no rule, texts agree that begin as chat templates begin them
    begin = "<|im_end|>" if kind == "one blank in front" else ""
    for text in (begin + text for text in [*AWKWARD, *words, *WORDS]):
        assert file.tokenize(text, add_special=True) == tokenizer.encode(text), repr(text)


def test_metadata(
    make_tokenizer: Callable[[str], PreTrainedTokenizerFast],
    write_vocabulary: Callable[[str], Path],
) -> None:
    """Special tokens, what ends an answer and the chat template are those of the tokenizer."""
    from gguf import GGUFReader

    tokenizer = make_tokenizer("llama-bpe")
    reader = GGUFReader(write_vocabulary("llama-bpe"))
    found = {
        name.removeprefix("tokenizer."): field.contents() for name, field in reader.fields.items()
    }
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert found["ggml.pre"] == "llama-bpe"
    assert found["ggml.bos_token_id"] == tokenizer.bos_token_id
    assert found["ggml.eos_token_id"] == tokenizer.eos_token_id
    assert found["ggml.eot_token_id"] == end
    assert found["ggml.add_bos_token"] is True and found["ggml.add_eos_token"] is False
    assert found["chat_template"] == tokenizer.chat_template
    assert found["ggml.tokens"][end] == "<|im_end|>" and len(found["ggml.tokens"]) == 600


def test_llamacpp_stops_where_answers_end(write_vocabulary: Callable[[str], Path]) -> None:
    pytest.importorskip("xllamacpp")
    from qtune.export.consumers.llama_file import LlamaFile

    file = LlamaFile(write_vocabulary("gpt-2"))
    (end,) = file.tokenize("<|im_end|>")
    assert file.ends_answer(end) and file.ends_answer(1) and not file.ends_answer(5)


def test_too_many_ends_are_refused(
    make_tokenizer: Callable[[str], PreTrainedTokenizerFast], tmp_path: Path
) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    with pytest.raises(UserError, match=r"4 tokens .*generation_config"):
        add_tokenizer(writer, make_tokenizer("gpt-2"), 600, [5, 6, 7])
