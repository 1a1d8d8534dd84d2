import pytest

from qtune.evaluate.strict_json import parsed, same


@pytest.mark.parametrize("text", ["", "{", '{"a": NaN}', '{"a": 1, "a": 1}', "[1] 2", "Infinity"])
def test_what_is_no_strict_json(text):
    with pytest.raises(ValueError):
        parsed(text)


def test_endless_brackets():
    with pytest.raises(RecursionError):
        parsed("[" * 100_000)


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        ('{"a": 1, "b": [2]}', '{"b":[2],"a":1}', True),
        ("[1, 2]", "[2, 1]", False),
        ("1", "1.0", False),
        ("1", "true", False),
        ('[{"a": 1}]', '[{"a": "1"}]', False),
        ("null", "null", True),
        ("[1]", "[1, 1]", False),
    ],
)
def test_values_and_their_types_count(a, b, equal):
    assert same(parsed(a), parsed(b)) is equal
