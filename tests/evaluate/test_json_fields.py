import pytest

from qtune.evaluate.json_fields import field_shares, fields, share_of_fields

REFERENCE = '{"amount": 12.5, "people": ["Ann", "Bo"], "place": {"city": "Rome", "zip": null}}'


@pytest.mark.parametrize(
    ("answer", "share"),
    [
        (REFERENCE, 1),
        (REFERENCE.replace("12.5", "12"), 3 / 4),
        (REFERENCE.replace('"Ann", "Bo"', '"Bo", "Ann"'), 3 / 4),
        (REFERENCE.replace("Rome", "Oslo"), 3 / 4),
        # a field that is missing, one that is too many, and both
        (REFERENCE.replace(', "zip": null', ""), 3 / 4),
        (REFERENCE.replace("null}", 'null, "street": 1}'), 4 / 5),
        (REFERENCE.replace("zip", "code"), 3 / 5),
        ('{"place": {}}', 0),
        ("{}", 0),
        ("", 0),
        ("[" + REFERENCE + "]", 0),
        ("Here: " + REFERENCE, 0),
    ],
)
def test_share_of_right_fields(answer, share):
    assert share_of_fields(answer, REFERENCE) == pytest.approx(share)


def test_empty_objects():
    assert share_of_fields("{}", "{}") == 1
    assert share_of_fields('{"a": 1}', "{}") == 0
    assert share_of_fields('{"a": {}}', '{"a": {}}') == 1


def test_a_reference_that_is_no_object_has_no_right_answer():
    assert share_of_fields("[1]", "[1]") == 0


def test_fields_are_told_by_their_paths():
    names = ["amount", "people", "place.city", "place.zip"]
    assert list(fields(REFERENCE)) == names
    assert fields("[1]") is None and fields("[" * 100_000) is None


def test_each_field_has_its_share_of_right_answers():
    references = ['{"a": 1}', '{"a": 1, "b": 2}', '{"a": 1, "b": 2}', '{"a": 1, "c": 0}']
    answers = ['{"a": 1}', '{"a": 2, "b": 2}', "no idea", '{"c": 0, "d": 1}']
    found = field_shares(answers, references)
    assert found == {"a": 1 / 4, "b": 1 / 2, "c": 1}
    assert next(iter(found)) == "a"
