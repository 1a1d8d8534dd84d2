from collections import Counter

import numpy as np

from qtune.data.chunk import Hashes
from qtune.data.repeats import overlap, repeated, row_hashes
from qtune.data.rows import Row
from qtune.data.sample import Sample
from qtune.data.store import collected


def make(source, number, *texts, **options):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": t} for i, t in enumerate(texts)]
    return Row(source, number, messages, **options)


def stored(rows):
    return collected((Sample(row.place, [1, 2], [0.0, 1.0]), row_hashes(row)) for row in rows)


def found(findings):
    assert not any(finding.fatal for finding in findings.kept)
    return [str(finding) for finding in findings.kept]


def test_hashes_tell_conversations_apart():
    base = make("x", 1, "a", "b")
    assert row_hashes(base) == row_hashes(make("y", 9, "a", "b"))
    answer = row_hashes(make("x", 1, "a", "c"))
    assert answer.whole != row_hashes(base).whole and answer.prompt == row_hashes(base).prompt
    different = [
        base,
        make("x", 1, "a", "b", "c"),
        make("x", 1, "ab", ""),
        make("x", 1, "a", "b", rejected=make("x", 1, "a", "c").messages),
        make("x", 1, "a", "b", label=True),
        make("x", 1, "a", "b", label=False),
        Row("x", 1, [{"role": "system", "content": "a"}, {"role": "assistant", "content": "b"}]),
    ]
    assert len({row_hashes(row).whole for row in different}) == len(different)


def test_weights_do_not_tell_rows_apart_but_calls_do():
    weighted = make("x", 1, "a", "b")
    weighted.messages[1]["weight"] = 0.5
    assert row_hashes(weighted) == row_hashes(make("x", 1, "a", "b"))
    calls = [
        [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"name": name}]}]
        for name in "fg"
    ]
    assert len({row_hashes(Row("x", 1, messages)).whole for messages in calls}) == 2


def test_texts_have_no_prompt_in_common():
    assert row_hashes(make("x", 1, "a")).prompt == 0


def test_repeated_rows_name_the_first():
    texts = [("a", "b"), ("a", "c"), ("a", "b"), ("d", "b"), ("a", "c"), ("a", "b")]
    rows = [make("t", number, *text) for number, text in enumerate(texts, start=1)]
    findings = repeated(stored(rows))
    assert found(findings) == [
        "t:3: the same as t:1",
        "t:5: the same as t:2",
        "t:6: the same as t:1",
    ]
    assert findings.counts == {"repeated": 3}


def test_nothing_repeated():
    assert repeated(stored([make("t", 1, "a", "b")])).counts == Counter()
    assert found(repeated(stored([make("t", i, "a", str(i)) for i in range(9)]))) == []


def test_further_samples_of_a_row_are_no_rows():
    sample = Sample("t:1", [1, 2], [0.0, 1.0])
    split = collected([(sample, Hashes(5, 0)), (sample, Hashes(0, 0)), (sample, Hashes(0, 0))])
    assert repeated(split).counts == Counter()


def test_many_rows_agree_with_a_plain_search():
    draw = np.random.default_rng(0).integers(0, 300, 1000)
    rows = [make("t", i, "a", str(number)) for i, number in enumerate(draw.tolist())]
    first = {}
    expected = sum(first.setdefault(number, i) != i for i, number in enumerate(draw.tolist()))
    assert repeated(stored(rows)).counts["repeated"] == expected


def test_overlap():
    train = stored([make("t", 1, "a", "b"), make("t", 2, "c", "d"), make("t", 3, "a", "b")])
    held_out = stored([make("v", 1, "a", "b"), make("v", 2, "c", "x"), make("v", 3, "e", "d")])
    place = [sample.place for sample in held_out].__getitem__
    findings = overlap(train, held_out.whole, held_out.prompt, place)
    assert found(findings) == [
        "v:1: held out, but also a training row (t:1)",
        "v:2: held out, but training has its prompt (t:2)",
    ]
    assert findings.counts == {"held out and trained on": 1, "prompt trained on": 1}


def test_texts_overlap_as_a_whole_only():
    train = stored([make("t", 1, "a"), make("t", 2, "b")])
    held_out = stored([make("v", 1, "b"), make("v", 2, "c")])
    findings = overlap(train, held_out.whole, held_out.prompt, "vw".__getitem__)
    assert found(findings) == ["v: held out, but also a training row (t:2)"]


def test_nothing_held_out():
    train = stored([make("t", 1, "a", "b")])
    none = np.empty(0, np.uint64)
    assert overlap(train, none, none, str).counts == Counter()
