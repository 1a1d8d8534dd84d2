from qtune.report.prompts import Reply, beside
from qtune.report.samples import MAX_CHARACTERS

ENTRY = {
    "prompt": "Why?",
    "reference": "So.",
    "answers": {"b": "no", "gone": "yes", "a": "yes", "c": "no"},
}


def test_equal_answers_stand_together_in_the_order_of_the_table():
    asked = beside(ENTRY, ["a", "b", "c", "d"])
    assert asked.replies == [Reply(["a", "gone"], "yes"), Reply(["b", "c"], "no")]
    assert (asked.prompt, asked.reference) == ("Why?", "So.")


def test_long_texts_are_cut_and_differ_all_the_same():
    long = "x" * MAX_CHARACTERS
    entry = {"prompt": long + "y", "reference": None, "answers": {"a": long + "1", "b": long + "2"}}
    asked = beside(entry, ["a", "b"])
    assert len(asked.replies) == 2 and asked.reference is None
    assert all("cut here" in text for text in (asked.prompt, asked.replies[0].text))
