"""What goes along with the weights, read back by transformers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from qtune.export.folder.companions import (
    generation_config,
    stop_ids,
    write,
    write_config,
    write_json,
)
from qtune.model.load import load_tokenizer


@pytest.fixture
def base(bases: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(bases["llama"], tmp_path / "base"))


@pytest.fixture
def tokenizer(base: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(base)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def test_tokenizer_is_copied_bit_for_bit(
    base: Path, tokenizer: PreTrainedTokenizerBase, out: Path
) -> None:
    (base / "NOTICE.txt").write_text("notice")
    (base / "README.md").write_text("the base's card")
    (base / "modeling_own.py").write_text("x = 1\n")
    (base / "training_args.bin").write_text("not wanted")
    write(base, tokenizer, out)
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "LICENSE",
        "NOTICE.txt",
        "modeling_own.py",
    ):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert (out / "README.base.md").read_text() == "the base's card"
    assert not (out / "README.md").exists() and not list(out.glob("*.bin"))
    assert not list(out.glob("*.safetensors"))


def test_template_is_that_of_the_trained_tokenizer(
    base: Path, tokenizer: PreTrainedTokenizerBase, out: Path
) -> None:
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    write(base, tokenizer, out)
    again = AutoTokenizer.from_pretrained(out)
    text = again.apply_chat_template([{"role": "user", "content": "hé"}], tokenize=False)
    assert text == "[hé]"


def test_generation_stops_where_the_template_ends_a_turn(
    base: Path, tokenizer: PreTrainedTokenizerBase, out: Path
) -> None:
    end, turn = (tokenizer.convert_tokens_to_ids(t) for t in ("<|endoftext|>", "<|im_end|>"))
    (base / "generation_config.json").unlink()
    write(base, tokenizer, out)
    config = GenerationConfig.from_pretrained(out)
    assert config.eos_token_id == [end, turn]
    assert config.pad_token_id == tokenizer.pad_token_id and config.bos_token_id is not None


@pytest.mark.parametrize(
    ("known", "expected"), [(7, [7, 0, 2]), ([7, 0], [7, 0, 2]), (None, [0, 2])]
)
def test_known_stops_are_kept(
    known: Any, expected: list[int], tokenizer: PreTrainedTokenizerBase
) -> None:
    assert stop_ids(tokenizer, known) == expected


def test_without_a_template_the_end_token_stops(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = None
    assert stop_ids(tokenizer) == [0]


def test_one_stop_is_written_as_a_number(base: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = None
    settings = {"eos_token_id": 0, "temperature": 0.7, "do_sample": True}
    (base / "generation_config.json").write_text(json.dumps(settings))
    found = generation_config(base, tokenizer)
    assert found["eos_token_id"] == 0 and found["temperature"] == 0.7
    (base / "generation_config.json").unlink()
    assert generation_config(base, tokenizer)["eos_token_id"] == 0


def test_config_has_the_changes_and_nothing_stale(base: Path, out: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    stale = {"quantization_config": {"quant_method": "gptq"}, "torch_dtype": "float32"}
    (base / "config.json").write_text(json.dumps(config | stale | {"_name_or_path": "/home/me"}))
    write_config(base, out, {"dtype": "bfloat16"})
    assert json.loads((out / "config.json").read_text()) == config | {"dtype": "bfloat16"}


def test_json_has_lists_of_numbers_on_one_line(tmp_path: Path) -> None:
    value = {"a": [1, -2.5e-07, 3], "b": [[1], [2]], "c": ["x\n1,\n"], "d": [], "e": "[\n 1\n]"}
    write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == value
    assert '"a": [1, -2.5e-07, 3],\n' in text and "    [1],\n" in text


def test_old_template_in_the_tokenizers_configuration_is_replaced(
    base: Path, tokenizer: PreTrainedTokenizerBase, out: Path
) -> None:
    """Libraries from before chat_template.jinja read it there."""
    path = base / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"chat_template": "old"}))
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    write(base, tokenizer, out)
    written = json.loads((out / "tokenizer_config.json").read_text())
    assert written == config | {"chat_template": tokenizer.chat_template}
