import math
from dataclasses import replace

import pytest

from qtune.evaluate.exact_match import Score
from qtune.evaluate.generate import Answers
from qtune.evaluate.intervals import wilson_interval
from qtune.evaluate.paired import Difference
from qtune.evaluate.perplexity import Likelihood
from qtune.evaluate.table import Row, Table, make_row


def row(name, kind, loss, tokens=10):
    return make_row(name, kind, Likelihood(loss=loss, tokens=tokens), size_bytes=5)


def recoveries(table):
    return {row.name: row.recovery for row in table.rows}


def test_row_from_measurements() -> None:
    made = make_row(
        "export bf16",
        "export",
        Likelihood(loss=0.5, tokens=10, kl=0.1, top1=0.9, compared=8),
        size_bytes=5,
        change=Difference(0.01, 0.002, 7),
        score=Score([1, 0, 1, 1]),
        metric="exact_match",
        p_value=0.25,
        answers=Answers(["a"] * 4, num_tokens=30, seconds=2.0),
        consumer="transformers",
        exact=False,
    )
    assert made == Row(
        name="export bf16", kind="export", loss=0.5, perplexity=math.exp(0.5), tokens=10, kl=0.1,
        top1=0.9, nats=0.01, standard_error=0.002, exact_match=0.75, metric="exact_match",
        interval=wilson_interval(3, 4), p_value=0.25, answers=4, size_bytes=5, tokens_per_s=15.0,
        consumer="transformers", exact=False,
    )  # fmt: skip


def test_row_without_answers() -> None:
    made = row("base", "base", 0.5)
    assert (made.kl, made.top1, made.exact_match, made.answers) == (None, None, None, 0)
    assert (made.tokens_per_s, made.nats, made.interval, made.tasks) == (None, None, None, ())


def test_rows_are_sorted_by_kind_and_replaced_by_name(table: Table) -> None:
    table.put(row("merged onto original", "merged", 0.06))
    table.put(row("base nf4", "quantized", 3.5, tokens=4321))
    table.put(row("merged onto dequantized", "merged", 0.07))
    names = [found.name for found in table.rows]
    assert names == [
        *("base 16-bit", "base nf4", "adapter on nf4"),
        *("merged onto original", "merged onto dequantized", "export bitsandbytes"),
    ]
    table.put(row("base nf4", "quantized", 3.25, tokens=4321))
    assert [found.name for found in table.rows] == names and table.row("base nf4").loss == 3.25
    table.put(row("export bf16", "export", 0.06), instead="merged onto original")
    assert table.row("merged onto original") is None
    assert [found.name for found in table.rows][-2:] == ["export bitsandbytes", "export bf16"]


def test_recovery_is_the_share_of_the_gain_that_is_kept() -> None:
    table = Table("adapter on nf4")
    table.put(row("adapter on nf4", "adapter", 1.0))
    table.put(row("export bf16", "export", 1.5))
    assert table.gain() is None and set(recoveries(table).values()) == {None}
    table.put(row("base 16-bit", "base", 2.0))
    # there is no quantized base: the adapter was trained on this one
    assert table.gain() == 1.0 and recoveries(table)["export bf16"] == 0.5
    table.put(row("base nf4", "quantized", 3.0))
    assert table.put(row("export better", "export", 0.5)).recovery == 1.25
    assert recoveries(table) == {
        "base 16-bit": 0.5, "base nf4": 0.0, "adapter on nf4": 1.0, "export bf16": 0.75,
        "export better": 1.25,
    }  # fmt: skip


@pytest.mark.parametrize("base", [1.0, 0.5, math.nan])
def test_without_a_gain_there_is_none_to_keep(base: float) -> None:
    table = Table("a", [row("a", "adapter", 1.0), row("q", "quantized", base)])
    assert table.gain() is None
    assert set(recoveries(table.with_recovery()).values()) == {None}


def test_rows_of_other_tokens_are_not_compared() -> None:
    rows = [row("a", "adapter", 1.0), row("q", "quantized", 2.0), row("e", "export", 1.5, tokens=9)]
    table = Table("a", rows)
    assert recoveries(table.with_recovery()) == {"a": 1.0, "q": 0.0, "e": None}
    table.rows[1] = replace(rows[1], tokens=9)
    assert table.gain() is None


def test_with_recovery_leaves_the_table_alone() -> None:
    table = Table("a", [row("a", "adapter", 1.0), row("q", "quantized", 2.0)])
    assert table.with_recovery().rows[0].recovery == 1.0
    assert table.rows[0].recovery is None
