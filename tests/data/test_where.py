import datetime

import pytest

from qtune.data.values import BadRow
from qtune.data.where import Where, has_column
from qtune.errors import UserError


@pytest.mark.parametrize(
    ("wanted", "taken", "left"),
    [
        ("en", ["en"], ["de", "EN", None, 3, True]),
        (3, [3, 3.0, "3", " 3.0"], [4, "three", None, True]),
        (True, [True, "true", "True "], [False, "false", None, 1, "yes"]),
        (("en", 3), ["en", 3, "3"], ["de", 4, None]),
        (">= 3", [3, 3.5, "4"], [2.9, "2", None, ""]),
        ("<3", [2, "-1"], [3, "3", None]),
        ("> 2e-1", [0.3], [0.2]),
        ("<= -1", [-1, -2], [0]),
        ("!= en", ["de", None, 3], ["en"]),
        ("!= 3", [4, "4", None, "x"], [3, "3", 3.0]),
        ("!= true", [False, "false", None], [True, "true"]),
        ("!=", ["en", 0, False], [None, "", " \n"]),
        ("2026-01-02", [datetime.date(2026, 1, 2), "2026-01-02"], [datetime.date(2026, 1, 3)]),
    ],
)
def test_conditions(wanted, taken, left):
    where = Where({"a": wanted})
    assert [cell for cell in taken if not where.takes({"a": cell})] == []
    assert [cell for cell in left if where.takes({"a": cell})] == []


def test_all_conditions_must_hold():
    where = Where({"a": 1, "b": "x"})
    assert where.takes({"a": 1, "b": "x"})
    assert not where.takes({"a": 1, "b": "y"})
    assert Where({}).takes({})


def test_a_dot_leads_into_objects():
    where = Where({"meta.lang": "en"})
    assert where.takes({"meta": {"lang": "en"}})
    assert where.takes({"meta.lang": "en", "meta": {"lang": "de"}})
    assert not where.takes({"meta": "en"})
    assert not where.takes({})


def test_has_column():
    assert has_column({"a": None}, "a")
    assert has_column({"a": {"b": None}}, "a.b")
    assert not has_column({"a": 1}, "a.b")


@pytest.mark.parametrize("wanted", [">= three", "<", "> 1 2"])
def test_comparisons_without_a_number(wanted):
    with pytest.raises(UserError, match=r"data source: where\.a: .* compares with a number only; "):
        Where({"a": wanted})


@pytest.mark.parametrize(
    ("wanted", "cell", "fault"),
    [
        (">= 3", "high", "'a' is 'high', which where cannot compare with a number"),
        ("x", ["x"], "'a' holds a list, which where cannot compare"),
        (3, {"b": 3}, "'a' holds an object, which where cannot compare"),
    ],
)
def test_cells_that_cannot_be_compared(wanted, cell, fault):
    with pytest.raises(BadRow) as caught:
        Where({"a": wanted}).takes({"a": cell})
    assert caught.value.faults == [fault]
