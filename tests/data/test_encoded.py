import json
import subprocess
import sys

import pytest

from qtune.cache import cache_folder
from qtune.data import encoded as module
from qtune.data.chat import encode
from qtune.data.encoded import encoded, glimpsed
from qtune.data.rows import Problems
from qtune.data.sources import load
from qtune.errors import UserError
from qtune.recipe_data import Source

# a template that begins twice, and one that opens an answer that no text goes on with
TWICE = (
    "{{ bos_token }}{{ bos_token }}{% for m in messages %}{{ m.role }}{{ m.content }}"
    "{{ eos_token }}{% endfor %}"
)
OPENS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
)


pytestmark = pytest.mark.usefixtures("empty_cache")


@pytest.fixture
def source(tmp_path):
    """A maker of files of answers."""

    def write(*answers, name="train.jsonl", **columns):
        rows = [
            {"messages": [said("user", f"{i}?"), said("assistant", answer)], **columns}
            for i, answer in enumerate(answers)
        ]
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Source(path=str(path))

    return write


def said(role, text):
    return {"role": role, "content": text}


def never(*_, **__):
    raise AssertionError("encoded again")


def test_samples_are_those_of_the_rows(tiny_recipe, tokenizer, source):
    recipe, given = tiny_recipe(), source("x", "y")
    made = encoded(given, recipe, tokenizer)
    (x,), (y,) = (encode(tokenizer, row, settings=recipe.data) for row in load(given))
    assert list(made.samples) == [x, y]
    assert made.source == given and not made.findings.counts


def test_the_second_time_nothing_is_encoded(tiny_recipe, tokenizer, source, monkeypatch):
    recipe, given = tiny_recipe(), source("x", "y", "z")
    first = encoded(given, recipe, tokenizer)
    monkeypatch.setattr(module, "encode", never)
    monkeypatch.setattr(module, "read", never)
    # what has nothing to do with samples has no say
    other = tiny_recipe(train={"lr": 1.0, "batch_size": 1}, seed=9, data={"packing": False})
    again = encoded(given, other, tokenizer)
    assert list(again.samples) == list(first.samples)
    assert again.findings.kept == first.findings.kept


@pytest.mark.parametrize("options", [{"max_length": 100}, {"train_on": "all"}])
def test_other_options_are_encoded_anew(tiny_recipe, tokenizer, source, options, monkeypatch):
    given = source("x", "y")
    encoded(given, tiny_recipe(), tokenizer)
    monkeypatch.setattr(module, "encode", never)
    with pytest.raises(AssertionError, match="encoded again"):
        encoded(given, tiny_recipe(data=options), tokenizer)


ANOTHER = """
import sys
from pathlib import Path
from transformers import PreTrainedTokenizerFast
from qtune.data import encoded
from qtune.recipe import Data, Recipe, Train
from qtune.recipe_data import Source

def never(*_, **__):
    raise AssertionError("encoded again")

if sys.argv[3] == "maps":
    encoded.encode = encoded.read = never
tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[1])
recipe = Recipe(model="x", data=Data(train=sys.argv[2]), train=Train(steps=1), run=Path("run"))
made = encoded.encoded(Source(path=sys.argv[2]), recipe, tokenizer, builds=sys.argv[3] == "builds")
maps = open("/proc/self/maps").read()
print(made.samples.sha256, "samples.arrow" in maps)
"""


def test_another_process_only_maps_the_file(tokenizer, source, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    arguments = [str(tmp_path / "tokenizer"), source("x", "y").path]
    said = []
    for what in ("builds", "maps"):
        command = [sys.executable, "-c", ANOTHER, *arguments, what]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.split())
    assert said[0] == said[1] and said[0][1] == "True"


def test_odd_rows_are_told_again(tiny_recipe, tokenizer, source):
    recipe = tiny_recipe(data={"max_length": 40, "overlong": "truncate"})
    given = source("x", "y " * 50, "z " * 50)
    for _ in range(2):
        found = encoded(given, recipe, tokenizer).findings
        assert found.counts == {"cut": 2}
        assert [finding.place for finding in found.kept] == [f"{given.path}:{n}" for n in (2, 3)]


def test_rows_left_out_are_counted(tiny_recipe, tokenizer, source):
    recipe = tiny_recipe(data={"max_length": 40, "overlong": "drop"})
    made = encoded(source("x", "y " * 50, "z"), recipe, tokenizer)
    assert made.findings.counts == {"left out": 1}
    assert len(made.samples) == 2


def test_no_row_is_short_enough(tiny_recipe, tokenizer, source):
    recipe = tiny_recipe(data={"max_length": 40, "overlong": "drop"})
    with pytest.raises(
        UserError, match=r"not one of its rows can be used\n.*:1: left out: "
    ) as error:
        encoded(source("y " * 50, "z " * 50), recipe, tokenizer)
    assert str(error.value).endswith("train.jsonl:2: left out: longer than data.max_length")


def test_rows_that_spoil_a_run_are_named_and_nothing_is_kept(tiny_recipe, tokenizer, source):
    recipe = tiny_recipe(data={"max_length": 40})
    given = source(*(["x", "z"] + ["y " * (50 + i) for i in range(20)]))
    with pytest.raises(UserError) as error:
        encoded(given, recipe, tokenizer)
    lines = str(error.value).splitlines()
    assert lines[0].startswith(f"{given.path}:3: ") and "data.max_length is 40" in lines[0]
    assert len(lines) == Problems.limit + 1 and lines[-1].startswith("stopped after 10 problems")
    assert not list(cache_folder().rglob("*.arrow"))


def test_fatal_findings_are_named(tiny_recipe, make_tokenizer, source):
    bare = make_tokenizer(TWICE, bos="<s>")
    given = source("x", "y")
    with pytest.raises(UserError, match=r"train.jsonl:1: begins with 2 BOS tokens"):
        encoded(given, tiny_recipe(data={"train_on": "all"}), bare)


def test_rows_must_suit_the_objective_whether_cached_or_not(tiny_recipe, tokenizer, source):
    given = source("x", "y", name="labels.jsonl", label=True)
    kto = tiny_recipe(train={"objective": "kto"})
    with pytest.raises(UserError, match=r"labels.jsonl:1: train.objective: sft needs"):
        encoded(given, tiny_recipe(), tokenizer)
    assert [sample.label for sample in encoded(given, kto, tokenizer).samples] == [True, True]
    with pytest.raises(UserError, match=r"labels.jsonl:1: train.objective: sft needs"):
        encoded(given, tiny_recipe(), tokenizer)


def test_a_stream_with_a_fatal_flaw_is_refused(tiny_recipe, make_tokenizer, source):
    bare = make_tokenizer(TWICE, bos="<s>")
    recipe = tiny_recipe(data={"train_on": "all", "streaming": True})
    with pytest.raises(UserError, match=r"train.jsonl:1: begins with 2 BOS tokens"):
        glimpsed(source("x", "y"), recipe, bare, 1000)


def test_rows_of_a_stream_that_teach_nothing_are_left_out(tiny_recipe, tokenizer, source):
    options = {"max_length": 40, "overlong": "truncate", "streaming": True}
    given = source("x", "z")
    long = {"messages": [said("user", "q " * 90), said("assistant", "a")]}
    with open(given.path, "a") as file:
        file.write(json.dumps(long) + "\n")
    made = glimpsed(given, tiny_recipe(data=options), tokenizer, 1000)
    assert len(made.samples) == 2
    (finding,) = made.findings.kept
    assert finding.problem.startswith("left out: no token would be learned")


def test_progress_is_told(tiny_recipe, tokenizer, source, monkeypatch):
    titles = []
    original = module.bar
    monkeypatch.setattr(module, "bar", lambda title: titles.append(title) or original(title))
    given = source("x")
    encoded(given, tiny_recipe(), tokenizer)
    assert titles == [f"tokenising {given.path}"]


def test_of_a_stream_the_first_rows_are_looked_at(tiny_recipe, tokenizer, source):
    recipe = tiny_recipe(data={"max_length": 40, "overlong": "truncate", "streaming": True})
    made = glimpsed(source("x", "y " * 50, "z", "z " * 50), recipe, tokenizer, 3)
    assert len(made.samples) == 3 and made.findings.counts == {"cut": 1}
    assert not list(cache_folder().rglob("*.arrow"))


def test_bad_rows_of_a_stream_are_left_out(tiny_recipe, tokenizer, source):
    recipe = tiny_recipe(data={"max_length": 40, "streaming": True})
    made = glimpsed(source(None, None, "y " * 50, "z"), recipe, tokenizer, 1000)
    assert len(made.samples) == 1 and made.findings.counts == {"left out": 3}
    assert [finding.place[-2:] for finding in made.findings.kept] == [":1", ":2", ":3"]
    with pytest.raises(UserError, match="not one of its rows can be used"):
        glimpsed(source("y " * 50, name="b.jsonl"), recipe, tokenizer, 1000)
    with pytest.raises(UserError, match="objective: sft needs"):
        glimpsed(source("y", name="c.jsonl", label=True), recipe, tokenizer, 1000)


def test_a_prompt_that_the_rows_do_not_go_on_from_is_noted_once(
    tiny_recipe, make_tokenizer, source
):
    found = encoded(source("x", "y"), tiny_recipe(), make_tokenizer(OPENS))
    (told,) = found.findings.of("other prompt")
    assert told.place.endswith("train.jsonl:1") and not told.fatal
    plain = make_tokenizer(OPENS.replace("<think>", ""))
    assert not encoded(source("x", "y"), tiny_recipe(), plain).findings.of("other prompt")


def test_a_source_with_rows_of_several_forms_is_refused(tiny_recipe, tokenizer, tmp_path):
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (chat, {"text": "hello"})))
    with pytest.raises(UserError, match=r"rows\.jsonl:2: this row is plain text, and"):
        encoded(Source(path=str(path)), tiny_recipe(), tokenizer)
