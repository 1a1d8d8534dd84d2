import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AddedToken

from qtune.data import identity
from qtune.data.identity import code_hash, samples_key, tokenizer_hash
from qtune.errors import UserError
from qtune.recipe_data import Data, Source


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"question": "a", "answer": "b"}) + "\n")
    return path


@pytest.fixture
def key(file, tokenizers):
    """The key with some of what it depends on changed."""

    def make(source=(), settings=(), tokenizer=None):
        return samples_key(
            replace(Source(path=str(file)), **dict(source)),
            tokenizer or tokenizers["chatml"],
            replace(Data(train=str(file)), **dict(settings)),
        )

    return make


def test_the_same_things_have_the_same_key(key):
    assert key() == key() and len(key()) == 64


def test_contents_change_the_key(key, file):
    before = key()
    file.write_text(file.read_text().replace("b", "c"))
    assert key() != before


def test_the_time_of_the_file_does_not(key, file):
    before = key()
    file.touch()
    assert key() == before


@pytest.mark.parametrize(
    "options",
    [
        {"format": "alpaca"},
        {"columns": {"instruction": "question"}},
        {"where": {"answer": "b"}},
        {"rows": 1},
    ],
)
def test_options_of_the_source_change_the_key(key, options):
    assert key(source=options) != key()


@pytest.mark.parametrize(
    "options", [{"max_length": 512}, {"overlong": "truncate"}, {"train_on": "all"}]
)
def test_options_that_change_samples_change_the_key(key, options):
    assert key(settings=options) != key()


def test_what_does_not_change_samples_does_not_change_the_key(key):
    # the key is not given the rest of the recipe, such as train.lr
    assert key(source={"weight": 0.3}) == key()
    assert key(settings={"packing": False, "validation": 0.2, "test": "demo:test"}) == key()


def test_the_template_changes_the_key(key, tokenizers, make_tokenizer):
    chatml = tokenizers["chatml"]
    template = chatml.chat_template + " "
    assert key(tokenizer=make_tokenizer(template, bos=chatml.bos_token, eos=chatml.eos_token)) != (
        key(tokenizer=make_tokenizer(template[:-1], bos=chatml.bos_token, eos=chatml.eos_token))
    )


def test_the_tokenizer_changes_the_key(key, make_tokenizer):
    made = [make_tokenizer("x") for _ in range(2)]
    assert key(tokenizer=made[0]) == key(tokenizer=made[1])
    made[1].add_tokens([AddedToken("<new>")])
    others = [made[1], make_tokenizer("x", bos="<s>"), make_tokenizer("x", eos="<eos>")]
    others.append(make_tokenizer("x", bos="<s>", adds_bos=True))
    keys = {key(tokenizer=tokenizer) for tokenizer in [made[0], *others]}
    assert len(keys) == 5


def test_using_a_tokenizer_does_not_change_its_hash(make_tokenizer):
    tokenizer = make_tokenizer("x")
    before = tokenizer_hash(tokenizer)
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert "padding" in tokenizer.backend_tokenizer.to_str()
    assert tokenizer_hash(tokenizer) == before


def test_a_slow_tokenizer_is_refused(key):
    with pytest.raises(UserError, match="only fast tokenizers are supported"):
        key(tokenizer=SimpleNamespace(is_fast=False))


def test_code_changes_the_key(key, monkeypatch):
    before = key()
    monkeypatch.setattr(identity, "code_hash", lambda: "other")
    assert key() != before


def test_a_new_release_of_a_library_changes_the_key(key, monkeypatch):
    before = key()
    for library in ("jinja2", "tokenizers", "transformers"):
        with monkeypatch.context() as patch:
            patch.setattr(identity, "version", lambda name, new=library: name + str(name == new))
            assert key() != before


def test_code_is_every_file_of_the_package(tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(Path(identity.__file__).parent, copy)
    # the copy is another folder for each call: hashes are kept by folder
    assert code_hash(copy) == code_hash()
    changed = []
    for number, name in enumerate(["chat.py", "formats/alpaca.py"]):
        other = tmp_path / f"other{number}"
        shutil.copytree(copy, other)
        with (other / name).open("a") as code:
            code.write("# a change\n")
        changed.append(code_hash(other))
    assert len({code_hash(), *changed}) == 3
