import pytest

from qtune.data.columns import missing, no_object, renamed, unknown


def test_renamed():
    record = {"question": "a", "answer": "b", "id": 1}
    assert renamed(record, {}) is record
    columns = {"instruction": "question", "output": "answer", "input": "context"}
    assert renamed(record, columns) == {"instruction": "a", "output": "b", "id": 1}


def test_the_mapping_wins_over_a_column_of_that_name():
    assert renamed({"text": "old", "body": "new"}, {"text": "body"}) == {"text": "new"}
    swapped = {"prompt": "completion", "completion": "prompt"}
    assert renamed({"prompt": 1, "completion": 2}, swapped) == {"prompt": 2, "completion": 1}


TURN = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("record", "suggestion"),
    [
        (
            {"question": "a", "answer": "b"},
            "; write format: alpaca, columns: {instruction: question, output: answer}",
        ),
        (
            {"Question": "a", "Response": "b", "id": 1},
            "; write format: alpaca, columns: {instruction: Question, output: Response}",
        ),
        ({"dialog": TURN}, "; write format: messages, columns: {messages: dialog}"),
        (
            {"dialog": [{"from": "human", "value": "hi"}]},
            "; write format: sharegpt, columns: {conversations: dialog}",
        ),
        ({"body": "a"}, "; write format: text, columns: {text: body}"),
        ({"texts": "a"}, "; write format: text, columns: {text: texts}"),
    ],
)
def test_unknown_columns_come_with_what_to_write(record, suggestion):
    found = unknown(record, {})
    assert found.startswith(f"this row has '{next(iter(record))}'")
    assert found.endswith(suggestion)


def test_unknown_columns_without_a_guess_come_with_all_formats():
    found = unknown({"a": 1, "b": 2}, {})
    assert found.startswith("this row has 'a', 'b', which fits no format; map the columns with")
    assert "alpaca: instruction + output;" in found
    assert "label: label + messages or " in found
    assert unknown({}, {}).startswith("this row has no columns, which fits no format")


def test_a_mapped_column_that_is_absent():
    found = unknown({"question": "a", "answer": "b"}, {"instruction": "qestion"})
    assert found == (
        "no column 'qestion' in this row, which has 'question', 'answer'; write columns: "
        "{instruction: question}"
    )
    assert unknown({"a": 1}, {"text": "xyz"}) == "no column 'xyz' in this row, which has 'a'"


def test_columns_that_a_format_lacks():
    found = missing({"instruction": "a", "response": "b"}, "alpaca", {})
    assert found == (
        "no column 'output' in this row, which has 'instruction', 'response'; write columns: "
        "{output: response}"
    )
    assert missing({"a": 1}, "label", {"label": "x"}).endswith(
        "; format: label needs label + messages or completion + label + prompt or instruction + "
        "label + output"
    )


def test_the_columns_of_the_nearest_form_are_named():
    assert missing({"prompt": "a", "label": 1}, "label", {}).startswith("no column 'completion'")


def test_no_object():
    assert no_object([1]) == 'a row must be an object such as {"messages": [...]}, not a list'
