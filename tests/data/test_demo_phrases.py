import difflib
import itertools
import re
from string import Formatter

import pytest

from qtune.data.demo_phrases import (
    CITIES,
    ITEMS,
    NAMES,
    PHRASES,
    TEST_NAMES,
    VENDOR_FIRST,
    VENDOR_LAST,
)

SPLITS = tuple(PHRASES)
GROUPS = tuple(vars(PHRASES["train"]))


def words_of(pattern):
    """The pattern's own words, without slots, case and punctuation."""
    return re.findall(r"[a-z']+", re.sub(r"\{\w+\}", " ", pattern).lower())


def slots_of(pattern):
    return sorted(slot.lower() for _, slot, _, _ in Formatter().parse(pattern) if slot)


def test_there_are_enough_patterns():
    frames = {split: len(PHRASES[split].frames) for split in SPLITS}
    assert frames["train"] >= 40
    assert frames["validation"] >= 8
    assert frames["test"] >= 12


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(SPLITS, 2)))
def test_no_pattern_is_in_two_splits(one, other):
    def keys(split):
        return {(tuple(words_of(p)), tuple(slots_of(p))) for p in PHRASES[split].all()}

    assert not keys(one) & keys(other)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_frames_are_worded_unlike_those_of_training(split):
    """Not one word or comma changed: at most three quarters of the words agree, in order."""
    for frame in PHRASES[split].frames:
        nearest = max(
            difflib.SequenceMatcher(None, words_of(frame), words_of(other)).ratio()
            for other in PHRASES["train"].frames
        )
        assert nearest < 0.75, frame


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("group", GROUPS)
def test_patterns_are_distinct_and_have_their_slots(split, group):
    patterns = getattr(PHRASES[split], group)
    assert patterns
    assert len(set(patterns)) == len(patterns)
    required = {
        "frames": {("money", "project", "what", "when", "with")},
        "people_inline": {("people",)},
        "people_sentence": {("people",)},
        "project_inline": {("code",)},
        "project_sentence": {("code",)},
        "noise": {(), ("number",), ("name",), ("money",)},
    }.get(group, {()})
    assert {tuple(slots_of(pattern)) for pattern in patterns} <= required


@pytest.mark.parametrize("split", SPLITS)
def test_a_receipt_is_missing_only_where_a_word_says_so(split):
    absent = re.compile(r"\b(no|not|never|lost|missing|forgot|gone|could not)\b", re.IGNORECASE)
    assert not any(absent.search(text) for text in PHRASES[split].receipt)
    assert all(absent.search(text) for text in PHRASES[split].no_receipt)


def test_values_are_unambiguous():
    items = [item for common, extra, _ in ITEMS.values() for item in (*common, *extra)]
    assert len(set(items)) == len(items)
    names = [*NAMES, *TEST_NAMES]
    assert len(set(names)) == len(names)
    # A name that is also a place or a shop would make the list of people undecidable.
    assert not set(names) & {*CITIES, *VENDOR_FIRST, *VENDOR_LAST}
