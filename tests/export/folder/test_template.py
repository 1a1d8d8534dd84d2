"""The template beside the weights, and that another one is refused."""

import hashlib
import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from qtune.data.template import use_template
from qtune.errors import UserError
from qtune.export.folder.manifest import write_template
from qtune.export.folder.template import check, facts, write_text
from qtune.model.load import load_tokenizer


@pytest.fixture
def tokenizer(bases: dict[str, Path]) -> PreTrainedTokenizerBase:
    return load_tokenizer(bases["llama"])


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "adapter"
    folder.mkdir(parents=True)
    return folder


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_text_is_kept_byte_for_byte(tokenizer: PreTrainedTokenizerBase, adapter: Path) -> None:
    tokenizer.chat_template = "{% for m in messages %}\r\n{{ m['content'] }}ü\n{% endfor %}"
    tokenizer.save_pretrained(adapter)
    write_text(adapter, tokenizer)
    written = (adapter / "chat_template.jinja").read_bytes()
    assert written == tokenizer.chat_template.encode()


def test_facts(tokenizer: PreTrainedTokenizerBase) -> None:
    sha256 = digest(str(tokenizer.chat_template))
    assert facts(tokenizer) == {"template_sha256": sha256, "template_date": None}
    tokenizer.chat_template = "{{ strftime_now('%Y') }}"
    assert facts(tokenizer)["template_date"] == "2024-07-26"
    tokenizer.chat_template = None
    assert facts(tokenizer) == {"template_sha256": None, "template_date": None}


def test_another_template_is_refused(tokenizer: PreTrainedTokenizerBase, adapter: Path) -> None:
    trained = str(tokenizer.chat_template)
    write_template(adapter, tokenizer)
    check(adapter, tokenizer)
    tokenizer.chat_template = trained + " "
    with pytest.raises(UserError) as error:
        check(adapter, tokenizer)
    for part in (digest(trained)[:16], digest(trained + " ")[:16], "run/recipe.yaml"):
        assert part in str(error.value)
    # the way out that the message names
    use_template(tokenizer, str(adapter / "chat_template.jinja"))
    check(adapter, tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="and is none"):
        check(adapter, tokenizer)


def test_adapters_without_a_hash_pass(tokenizer: PreTrainedTokenizerBase, adapter: Path) -> None:
    check(adapter, tokenizer)
    tokenizer.chat_template = None
    write_template(adapter, tokenizer)
    assert json.loads((adapter / "qtune.json").read_text())["template_sha256"] is None
    assert not (adapter / "chat_template.jinja").exists()
    tokenizer.chat_template = "x"
    check(adapter, tokenizer)
