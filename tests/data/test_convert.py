import pytest

from qtune.data.convert import Converter
from qtune.data.values import BadRow
from qtune.errors import UserError
from qtune.recipe_data import Source


def converter(**options):
    return Converter(Source(path="x.jsonl", **options))


def test_where_sees_the_source_and_the_format_the_renamed_columns():
    made = converter(columns={"text": "body"}, where={"body": "!=", "lang": "en"})
    assert made.parts({"body": "a", "lang": "en"}).messages[0]["content"] == "a"
    assert made.parts({"body": "", "lang": "en"}) is None
    assert made.parts({"body": "a", "lang": "de"}) is None
    made.finish()


def test_rows_left_out_are_not_looked_at():
    assert converter(where={"lang": "en"}).parts({"lang": "de", "messages": 3}) is None


def test_a_record_must_be_an_object():
    with pytest.raises(BadRow, match="a row must be an object such as"):
        converter().parts([1])


def test_columns_nobody_has_are_told_at_the_end():
    made = converter(columns={"input": "contxt"}, where={"a.b": "!= 3", "c": "!= 1"})
    made.parts({"instruction": "a", "output": "b", "a": {"b": None}})
    with pytest.raises(UserError) as caught:
        made.finish()
    assert str(caught.value) == (
        "x.jsonl: no row has a column 'c', 'contxt', which the source names in columns or where"
    )


def test_a_column_may_be_absent_in_some_rows():
    made = converter(columns={"input": "context"})
    for record in ({"instruction": "a", "output": "b"}, {"instruction": "a", "output": "b"}):
        assert made.parts(record).messages[0]["content"] == "a"
    record = {"instruction": "a", "output": "b", "context": "c"}
    assert made.parts(record).messages[0]["content"] == "a\n\nc"
    made.finish()


def test_each_record_is_told_by_its_own_columns():
    made = converter()
    assert made.parts({"text": "a"}).plain
    assert not made.parts({"instruction": "a", "output": "b"}).plain
    with pytest.raises(BadRow, match="which fits no format"):
        made.parts({"x": 1})


def test_a_fault_says_what_the_source_calls_the_column():
    with pytest.raises(BadRow) as caught:
        converter(columns={"output": "answer"}).parts({"instruction": "a", "answer": None})
    assert caught.value.faults == [
        "'output' must be text, not nothing ('output' is the column 'answer')"
    ]


def test_a_named_format_is_insisted_on():
    with pytest.raises(BadRow, match="no column 'messages' in this row, which has 'text'"):
        converter(format="messages").parts({"text": "a"})


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            {"columns": {"question": "instruction"}},
            "no format has a column 'question'; the format's name comes first: "
            "{instruction: question}",
        ),
        ({"columns": {"instuction": "q"}}, "no format has a column 'instuction'; did you mean 'in"),
        (
            {"format": "text", "columns": {"messages": "m"}},
            "format: text does not have a column 'messages'; there are 'text'",
        ),
    ],
)
def test_names_that_no_format_has(options, problem):
    with pytest.raises(UserError) as caught:
        converter(**options)
    assert str(caught.value).startswith(f"data source: columns: {problem}")


def test_bad_conditions_are_told_before_reading():
    with pytest.raises(UserError, match=r"where\.a"):
        converter(where={"a": "> x"})
