"""Streams against the same rows read and encoded at once, and against themselves, interrupted."""

import json
from types import SimpleNamespace

import datasets
import pytest

from qtune import progress
from qtune.data import stream
from qtune.data.chat import encode
from qtune.data.sources import load
from qtune.data.stream import StreamFeed
from qtune.errors import UserError
from qtune.model.load import load_tokenizer
from qtune.recipe_data import Source


@pytest.fixture(scope="session")
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model)


@pytest.fixture
def said(monkeypatch):
    """What the terminal is told."""
    lines = []
    monkeypatch.setattr(progress.console, "print", lambda text, **options: lines.append(text))
    return lines


def conversation(name, number):
    messages = [{"role": "user", "content": f"{name} {number}"}]
    return {"messages": [*messages, {"role": "assistant", "content": "yes " * (number % 4 + 1)}]}


@pytest.fixture
def file(tmp_path):
    def write(name, rows):
        path = tmp_path / f"{name}.jsonl"
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) + "\n")
        return str(path)

    return write


@pytest.fixture
def feed(tiny_recipe, tokenizer):
    """A feed of the recipe with these sources."""

    def make(*sources, train=None, **data):
        settings = {"train": sources, "streaming": True, **data}
        return StreamFeed(tiny_recipe(data=settings, train=train or {}), tokenizer)

    return make


def places(samples):
    return [sample.place.rsplit("/", 1)[-1].replace(".jsonl", "") for sample in samples]


def taken(feed, *steps):
    return [places(feed.batch(step)) for step in steps]


def test_rows_come_in_their_order_and_again_from_the_start(feed, file):
    one = feed(file("a", [conversation("a", i) for i in range(6)]))
    assert taken(one, 0, 1) == [["a:1", "a:2", "a:3", "a:4"], ["a:5", "a:6", "a:1", "a:2"]]
    assert one.num_rows is None


def test_samples_are_those_of_the_rows(feed, file, tiny_recipe, tokenizer):
    path = file("a", [conversation("a", i) for i in range(4)])
    settings = tiny_recipe().data
    expected = [s for row in load(path) for s in encode(tokenizer, row, settings=settings)]
    assert feed(path).batch(0) == expected


def test_sources_take_turns_by_their_weights(feed, file):
    a, b = (file(name, [conversation(name, i) for i in range(40)]) for name in "ab")
    equal = "".join(p[0] for step in taken(feed(a, b), 0, 1) for p in step)
    assert equal == "abababab"
    weighted = feed(Source(path=a, weight=3.0), Source(path=b, weight=1.0))
    found = [p[0] for step in taken(weighted, *range(10)) for p in step]
    assert found.count("a") == 30
    # never further from its share than one sample
    for end in range(1, 40):
        assert abs(found[:end].count("a") - 0.75 * end) <= 1


@pytest.mark.parametrize("stop", range(7))
def test_a_restored_stream_goes_on_as_if_nothing_had_been(feed, file, stop):
    rows = [conversation("a", i) for i in range(7)]
    rows.insert(2, "no JSON")
    sources = (
        Source(path=file("a", rows), weight=2.0),
        Source(path=file("b", [conversation("b", i) for i in range(5)]), rows=3),
    )
    whole = feed(*sources)
    expected = taken(whole, *range(8))
    first = feed(*sources)
    assert taken(first, *range(stop)) == expected[:stop]
    again = feed(*sources)
    again.restore(json.loads(json.dumps(first.state())))
    assert taken(again, *range(stop, 8)) == expected[stop:]
    assert again.state() == whole.state()


def test_a_text_that_is_split_is_not_begun_anew(feed, file):
    rows = [{"text": "the train " * 60}, {"text": "to Berlin " * 60}]
    options = {"overlong": "split", "max_length": 32}
    train = {"objective": "pretrain", "batch_size": 3}
    path = file("a", rows)
    whole = feed(path, train=train, **options)
    expected = [whole.batch(step) for step in range(12)]
    # several samples of each row, so that steps end in the middle of one
    assert len(set(places(expected[0]))) == 1
    for stop in range(1, 12):
        first, again = (feed(path, train=train, **options) for _ in range(2))
        for step in range(stop):
            first.batch(step)
        again.restore(first.state())
        assert [again.batch(step) for step in range(stop, 12)] == expected[stop:]


def test_rows_before_are_passed_over_without_being_read(feed, file, monkeypatch):
    path = file("a", [conversation("a", i) for i in range(50)])
    first, again = feed(path), feed(path)
    taken(first, *range(10))
    again.restore(first.state())
    seen = []
    own = again._streams[0]._encode
    monkeypatch.setattr(again._streams[0], "_encode", lambda row: seen.append(row) or own(row))
    again.batch(10)
    # the last of those given, and what is new
    assert [row.number for row in seen] == [40, 41, 42, 43, 44]


def test_a_data_set_of_the_hub_is_skipped_by_its_own_means(feed, monkeypatch):
    skipped = []

    class Spied(datasets.IterableDataset):
        def skip(self, count):
            skipped.append(count)
            return super().skip(count)

    def load_dataset(name, config, *, split, revision, streaming):
        assert streaming and name == "org/name"
        rows = datasets.Dataset.from_list([conversation("h", i) for i in range(20)])
        made = rows.to_iterable_dataset()
        made.__class__ = Spied
        return made

    builder = SimpleNamespace(hash="0", config=SimpleNamespace(name="default"))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *given, **options: builder)
    whole = feed("org/name")
    expected = taken(whole, *range(7))
    first, again = feed("org/name"), feed("org/name")
    taken(first, 0, 1, 2)
    again.restore(first.state())
    assert taken(again, 3, 4, 5, 6) == expected[3:]
    assert expected[3:5] == [
        ["name:13", "name:14", "name:15", "name:16"],
        ["name:17", "name:18", "name:19", "name:20"],
    ]
    # the last row given is read again, to see whether there is more of it
    assert 11 in skipped


def test_bad_rows_are_left_out_and_the_first_ones_told(feed, file, said):
    good = [conversation("a", i) for i in range(4)]
    bad = [{"messages": [{"role": "user", "content": "only"}]}, "{", {"nothing": 1}] * 5
    one = feed(file("a", [*bad, *good]))
    assert taken(one, 0) == [["a:16", "a:17", "a:18", "a:19"]]
    assert one.left_out.count == 15
    assert len(said) == stream.MOST_TOLD + 1 and "without a word" in said[-1]
    assert all(f"a.jsonl:{i + 1}" in line for i, line in enumerate(said[:-1]))


def test_rows_of_another_form_are_left_out(feed, file, said):
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    one = feed(file("a", [conversation("a", 0), pair]), train={"batch_size": 2})
    assert taken(one, 0) == [["a:1", "a:1"]]
    assert "train.objective: sft needs" in said[0]


def test_a_source_without_a_usable_row_ends_the_run(feed, file, said):
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(UserError, match=r"a\.jsonl: not a single row can be used"):
        feed(file("a", [pair] * 3)).batch(0)
    with pytest.raises(UserError, match=r"b\.jsonl: holds no rows"):
        feed(file("b", ["{"] * 3)).batch(0)


def test_steps_come_one_after_the_other(feed, file):
    one = feed(file("a", [conversation("a", i) for i in range(6)]))
    with pytest.raises(ValueError, match="at step 0 and cannot give step 1"):
        one.batch(1)
    one.batch(0)
    with pytest.raises(ValueError, match="at step 1 and cannot give step 0"):
        one.batch(0)


def test_the_hash_is_of_contents_and_weights(feed, file):
    rows = [conversation("a", i) for i in range(4)]
    path = file("a", rows)
    first = feed(path).sha256
    assert feed(path).sha256 == first
    assert feed(Source(path=path, weight=2.0), path).sha256 != feed(path, path).sha256
    file("a", rows[:3])
    assert feed(path).sha256 != first
