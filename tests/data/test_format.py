"""What holds for every format, and one conversation in all that can say it."""

import random
from pathlib import Path
from typing import get_args

import pytest

import qtune.data.formats
from qtune.data.convert import Converter
from qtune.data.format import FORMAT_NAMES, all_columns, detect, load_format
from qtune.data.values import BadRow
from qtune.recipe_data import RowFormat, Source

USER = {"role": "user", "content": "Name a city."}
ASSISTANT = {"role": "assistant", "content": "Rome"}
CELLS = {
    "messages": [USER, ASSISTANT],
    "conversations": [
        {"from": "human", "value": "Name a city."},
        {"from": "gpt", "value": "Rome"},
    ],
    "instruction": "Name a city.",
    "output": "Rome",
    "prompt": "Name a city.",
    "completion": "Rome",
    "text": "Rome",
    "chosen": "Rome",
    "rejected": "Bread",
    "label": True,
}


def parts(record, name="auto", **columns):
    return Converter(Source(path="x", format=name, columns=columns)).parts(record)


def test_the_names_in_the_recipe_are_the_files():
    folder = Path(qtune.data.formats.__file__).parent
    files = {path.stem for path in folder.glob("[!_]*.py")}
    assert files == set(FORMAT_NAMES) == set(get_args(RowFormat)) - {"auto"}


def needs():
    return [(name, need) for name in FORMAT_NAMES for need in load_format(name).needs]


@pytest.mark.parametrize(("name", "need"), needs())
def test_every_format_is_told_by_its_columns_alone(name, need):
    record = {column: CELLS[column] for column in sorted(need)}
    assert detect(record) == name
    assert detect({**record, "id": 1, "source": "web"}) == name
    assert parts(record) == parts(record, name)
    renamed = {f"my_{column}": cell for column, cell in record.items()}
    assert parts(renamed, **{column: f"my_{column}" for column in need}) == parts(record)


@pytest.mark.parametrize(("name", "need"), needs())
@pytest.mark.parametrize("cell", [5, None, {"a": 1}, [5], [[]], "", "\ud800"])
def test_no_cell_is_taken_for_what_it_is_not(name, need, cell):
    """Each column spoilt in turn: always a fault that names it, never another exception."""
    for column in sorted(need):
        record = {c: CELLS[c] for c in sorted(need)} | {column: cell}
        with pytest.raises(BadRow) as caught:
            parts(record, name)
        assert all(isinstance(fault, str) for fault in caught.value.faults)


WORDS_AND_KEYS = (
    *("role", "user", "assistant", "tool", "content", "from", "gpt", "function_call", "value"),
    *("weight", "tool_calls", "id", "name", "function", "arguments", "type", "text"),
    *("[]", '[{"name": "x", "arguments": "{}"}]', "", "\ud800"),
)


def anything(draw, depth=0):
    """A value as JSON could have it, made of the words that formats look for."""
    kind = draw.random() if depth < 4 else 0
    if kind < 0.4:
        return draw.choice([*WORDS_AND_KEYS, None, True, 0, -1, 2.5, float("nan")])
    if kind < 0.6:
        roles = draw.choices(["user", "assistant", "tool"], k=draw.randint(1, 3))
        who, what = draw.choice([("role", "content"), ("from", "value")])
        return [{who: role, what: draw.choice(["hi", "yo"])} for role in roles]
    if kind < 0.8:
        return [anything(draw, depth + 1) for _ in range(draw.randint(0, 3))]
    keys = draw.sample(WORDS_AND_KEYS, draw.randint(0, 4))
    return {key: anything(draw, depth + 1) for key in keys}


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_any_record_is_a_row_or_a_fault(name):
    draw = random.Random(name)
    rows = 0
    for _ in range(2000):
        columns = [
            *sorted(draw.choice(load_format(name).needs)),
            *(column for column in sorted(load_format(name).takes) if draw.random() < 0.2),
        ]
        record = {column: anything(draw) for column in columns}
        try:
            found = parts(record, name)
        except BadRow as bad:
            assert bad.faults
            continue
        rows += 1
        for message in (*found.messages, *(found.rejected or [])):
            assert message["role"] in ("system", "user", "assistant", "tool")
            assert message["content"].strip() if "content" in message else message["tool_calls"]
    assert 0 < rows < 2000


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_every_row_ends_with_an_answer(name):
    for need in load_format(name).needs:
        found = parts({column: CELLS[column] for column in need}, name)
        assert found.messages[-1] == ASSISTANT
        assert found.rejected is None or found.rejected[-1] == {**ASSISTANT, "content": "Bread"}


TURNS = [
    ("system", "Answer briefly.\n"),
    ("user", "What is 2 + 2?"),
    ("assistant", " 4 "),
    ("user", "Und mit Ümlaut? \u2028 {{ x }}"),
    ("assistant", "„Ja“ 😀"),
]
WORDS = {"system": "system", "user": "human", "assistant": "gpt"}
SAME = {
    "messages": {"messages": [{"role": role, "content": text} for role, text in TURNS]},
    "sharegpt": {
        "conversations": [{"from": WORDS[role], "value": text} for role, text in TURNS],
    },
    "alpaca": {
        "system": TURNS[0][1],
        "history": [[TURNS[1][1], TURNS[2][1]]],
        "instruction": TURNS[3][1],
        "output": TURNS[4][1],
    },
    "prompt_completion": {
        "prompt": [{"role": role, "content": text} for role, text in TURNS[:-1]],
        "completion": [{"role": "assistant", "content": TURNS[4][1]}],
    },
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_conversation_gives_the_same_messages(name):
    found = parts(SAME[name])
    assert found.messages == SAME["messages"]["messages"]
    assert found == parts(SAME["messages"])


@pytest.mark.parametrize("name", ["messages", "sharegpt", "prompt_completion"])
def test_the_system_prompt_may_be_a_column(name):
    first, *rest = SAME[name]
    record = {**SAME[name], first: SAME[name][first][1:], "system": TURNS[0][1]}
    assert rest == list(record)[1:-1]
    assert parts(record) == parts(SAME[name])
    # Said twice, it is the same; said in two ways, it is not clear.
    assert parts({**SAME[name], "system": TURNS[0][1]}) == parts(SAME[name])
    with pytest.raises(BadRow, match="another one in the column 'system'"):
        parts({**SAME[name], "system": "Answer at length."})


@pytest.mark.parametrize("name", ["messages", "alpaca", "prompt_completion"])
def test_a_label_changes_nothing_else(name):
    assert parts({**SAME[name], "label": True}).messages == SAME["messages"]["messages"]


def test_unknown_columns_have_no_format():
    assert detect({"question", "answer"}) is None
    assert detect(set()) is None


def test_columns():
    assert load_format("alpaca").columns == {
        *("instruction", "input", "output"),
        "system",
        "history",
    }
    assert {"messages", "chosen", "label", "text"} <= all_columns()
