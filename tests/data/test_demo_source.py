import pytest

from qtune.data import demo
from qtune.data.demo_forms import FORMS
from qtune.data.demo_source import records
from qtune.data.sources import load
from qtune.errors import UserError


def test_rows_and_seed():
    assert records("demo:test?rows=3") == demo.rows("test", 3)
    assert records("demo:test?rows=3&seed=1") == demo.rows("test", 3, seed=1)
    assert records("demo:validation") == demo.rows("validation")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_as_it_is_called(form):
    rows = load(f"demo:test?rows=4&form={form}")
    answers = [row["messages"][-1]["content"] for row in demo.rows("test", 4)]
    for row, answer in zip(rows, answers, strict=True):
        assert row.plain is (form == "text")
        assert (row.rejected is not None) is (form == "preference")
        assert (row.label is not None) is (form == "label")
        if row.label is not False:
            assert row.messages[-1]["content"].endswith(answer)


@pytest.mark.parametrize("source", ["demo:", "demo:training", "demo:test.jsonl"])
def test_unknown_split(source):
    with pytest.raises(UserError, match="no such split; use demo:train, demo:validation, demo:tes"):
        records(source)


@pytest.mark.parametrize(
    "query", ["rows=x", "rows=0", "rows=-5", "row=5", "rows", "seed=a", "form=chat", "form="]
)
def test_bad_option(query):
    with pytest.raises(UserError, match=r"is not an option; write \?rows=500, \?seed=1 or \?form="):
        records(f"demo:train?{query}")
