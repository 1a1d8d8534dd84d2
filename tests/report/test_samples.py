import json

from qtune.report.samples import MAX_CHARACTERS, Field, clipped, compared, laid_out


def sample(before, after, reference):
    verdicts = {"correct_before": False, "correct_after": True}
    texts = {"prompt": "p", "before": before, "after": after, "reference": reference}
    return laid_out(texts | verdicts)


def test_fields_are_compared_with_the_reference():
    answer = {"date": "2024", "amount": 5, "note": None}
    reference = {"people": [], "date": "2025", "amount": 5, "project": None}
    assert list(compared(answer, reference)) == [
        Field("date", '"2024"', "different"),
        Field("amount", "5", "same"),
        Field("note", "null", "extra"),
        Field("people", "", "missing"),
        Field("project", "", "missing"),
    ]


def test_numbers_are_equal_by_value_and_types_are_told_apart():
    def state(value, reference):
        (field,) = compared({"x": value}, {"x": reference})
        return field.state

    assert state(2800.0, 2800) == "same"
    assert state({"a": 1, "b": 2}, {"b": 2, "a": 1}) == "same"
    assert state(True, 1) == "different"
    assert state("1", 1) == "different"
    assert state(None, "null") == "different"


def test_values_are_shown_as_they_were_written():
    (field,) = compared({"x": 2800.0}, {"x": 2800})
    assert field.value == "2800.0"


def test_what_is_no_object_is_text():
    shown = sample("Sure! {}", '{"a": 1}', '{"a": 1}')
    before, after, reference = shown.answers
    assert not before.fields and before.text == "Sure! {}"
    assert [field.state for field in (*after.fields, *reference.fields)] == ["same", "same"]
    assert [answer.correct for answer in shown.answers] == [False, True, None]


def test_an_object_is_text_where_the_reference_is_none():
    assert all(not answer.fields for answer in sample("{}", '{"a": 1}', "a word").answers)


def test_brackets_without_end_are_text():
    (before, *_) = sample('{"a":' * 100_000, "{}", '{"a": 1}').answers
    assert not before.fields


def test_long_texts_are_cut_and_say_so():
    text = "é" * (MAX_CHARACTERS + 1)
    assert clipped(text[:-1]) == text[:-1]
    assert clipped(text).startswith(text[:-1]) and "1,501 characters" in clipped(text)
    long = sample(json.dumps({"a": text}), "{}", '{"a": 1}').answers[0].fields[0].value
    assert len(long) < MAX_CHARACTERS + 100
