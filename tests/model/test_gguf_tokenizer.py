from pathlib import Path

import pytest
from gguf import GGUFReader, GGUFWriter
from transformers import AutoTokenizer

from qtune.errors import UserError
from qtune.model.gguf_tokenizer import byte_pairs, write_tokenizer

TEXTS = [
    "hello world 12 3.14 1212",
    "naïve café 東京 😀 \u00a0x",
    "  two  spaces\n\n\ttab\r\n end  ",
    "I'm we'll DON'T ½ ² Ⅷ",
    "a . b , c ! 'quoted'",
]


def meta_of(path):
    return {key: field.contents() for key, field in GGUFReader(path).fields.items()}


def tokenizer_of(tiny_gguf, tmp_path, **changes):
    path = tmp_path / "x.gguf"
    tiny_gguf(**changes).write(path)
    write_tokenizer(meta_of(path), path, tmp_path, 128)
    return AutoTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "pre, text, pieces",
    [
        ("smollm", "12", ["1", "2"]),
        ("smollm", "hello 12", ["hello", "Ġ", "1", "2"]),
        ("gpt-2", "12", ["12"]),
        ("gpt-2", "hello 12", ["hello", "Ġ1", "2"]),
        ("qwen2", "12 12", ["1", "2", "Ġ", "1", "2"]),
        ("llama-bpe", "12 12", ["12", "Ġ", "12"]),
    ],
)
def test_digits_are_split_as_the_family_does(tiny_gguf, tmp_path, pre, text, pieces):
    tokenizer = tokenizer_of(tiny_gguf, tmp_path, pre=pre)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids) == pieces


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "qwen2", "llama-bpe"])
@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_the_text_back(tiny_gguf, tmp_path, pre, text):
    tokenizer = tokenizer_of(tiny_gguf, tmp_path, pre=pre)
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_special_tokens_are_single_ids(tiny_gguf, tmp_path):
    tokenizer = tokenizer_of(tiny_gguf, tmp_path)
    ids = tokenizer.encode("<|im_start|>hello<|im_end|>")
    assert ids[0] == 1 and ids[-1] == 2
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|im_start|>", "hello", "<|im_end|>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello"


def test_bos_only_where_the_family_or_the_file_wants_it(tiny_gguf, tmp_path):
    from gguf import GGUFValueType

    assert tokenizer_of(tiny_gguf, tmp_path).encode("hello")[0] != 1
    assert tokenizer_of(tiny_gguf, tmp_path, pre="llama-bpe").encode("hello")[0] == 1
    asked = {"tokenizer.ggml.add_bos_token": (True, GGUFValueType.BOOL)}
    assert tokenizer_of(tiny_gguf, tmp_path, meta=asked).encode("hello")[0] == 1


@pytest.mark.parametrize("pre", ["nonesuch", None])
def test_unknown_rule_is_refused_and_not_guessed(tiny_gguf, tmp_path, pre):
    tiny_gguf(pre=pre).write(tmp_path / "x.gguf")
    with pytest.raises(UserError, match=r"tokenizer\.ggml\.pre"):
        byte_pairs(meta_of(tmp_path / "x.gguf"), tmp_path / "x.gguf")


def sentencepiece_file(path: Path, add_space_prefix: bool) -> Path:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = ["▁", "a", "b", "ab", "▁ab"]
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*tokens, *words])
    writer.add_token_scores([0.0] * len(tokens) + [-5.0, -6.0, -7.0, -1.0, -2.0])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(words))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_space_prefix(add_space_prefix)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_sentencepiece_vocabulary(tmp_path):
    path = sentencepiece_file(tmp_path / "x.gguf", add_space_prefix=True)
    write_tokenizer(meta_of(path), path, tmp_path, 128)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.encode("ab é")
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "▁ab", "▁", "<0xC3>", "<0xA9>"]


def test_sentencepiece_without_a_blank_in_front_is_refused(tmp_path):
    path = sentencepiece_file(tmp_path / "x.gguf", add_space_prefix=False)
    with pytest.raises(UserError, match="blank in front"):
        write_tokenizer(meta_of(path), path, tmp_path, 128)
