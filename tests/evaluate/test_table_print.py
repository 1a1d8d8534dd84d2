import io
import math
from dataclasses import replace

import pytest
from rich.console import Console

from qtune.evaluate.long_context import CacheEffect
from qtune.evaluate.table import Table
from qtune.evaluate.table_print import print_table


def shown(table: Table, *, width: int = 120, terminal: bool = False) -> str:
    out = io.StringIO()
    print_table(Console(file=out, width=width, force_terminal=terminal), table)
    return out.getvalue()


def test_table_in_a_file_is_plain_and_fits(table: Table) -> None:
    text = shown(table)
    assert "\x1b" not in text
    lines = [line.rstrip() for line in text.splitlines()]
    assert max(map(len, lines)) <= 120
    assert [" ".join(line.split()) for line in lines[:4]] == [
        "model loss change ppl KL top-1 JSON match p size tok/s",
        "base 16-bit 3.2500 +3.1988 ±0.0412 25.790 2.8125 45.7% 0.0% (0-4) <.001 269.1 MB 304.3",
        "adapter on nf4 0.0512 - 1.052 - - 87.0% (79-92) - 105.0 MB 304.3",
        "export bitsandbytes 0.0514 +0.0002 1.052 0.0004 99.9% - - 12.3 GB -",
    ]
    legend = " ".join(lines[4:])
    assert "4321 held-out tokens" in legend and "against adapter on nf4" in legend
    assert "JSON match of 100 answers" in legend and "recovery" not in legend


def test_recovery_is_shown_and_told(table: Table) -> None:
    table.put(replace(table.rows[0], name="base nf4", kind="quantized", loss=4.0512))
    text = shown(table)
    # of a gain of 4 nats 0.0002 are lost
    assert "100.0%" in text and "0.0%" in text and "20.0%" in text
    assert "recovery: share of the tuning's gain" in " ".join(text.split())


def test_table_in_a_terminal_marks_the_trained_model(table: Table) -> None:
    (line,) = [
        line for line in shown(table, terminal=True).splitlines() if "adapter on nf4 " in line
    ]
    assert "\x1b[1m" in line


def test_no_figure_is_cut_at_80_columns(table: Table) -> None:
    text = shown(table, width=80)
    heading, *_ = text.splitlines()
    assert max(map(len, text.splitlines())) <= 80
    for figure in ("3.2500", "+3.1988 ±0.0412", "2.8125", "87.0% (79-92)", "269.1 MB"):
        assert figure in text
    # what has gone, in this order
    assert "ppl" not in heading and "tok/s" not in heading and "KL" in heading


def test_columns_go_only_as_far_as_they_have_to(table: Table) -> None:
    table.put(replace(table.rows[0], name="base nf4", kind="quantized", loss=4.0512))
    widths = range(120, 80, -1)
    headings = [shown(table, width=width).splitlines()[0] for width in widths]
    counts = [len([n for n in (" ppl ", " tok/s", " p ") if n in h]) for h in headings]
    assert counts == sorted(counts, reverse=True) and set(counts) == {3, 2, 1, 0}


def test_all_columns_fit_where_there_is_no_terminal(table: Table) -> None:
    table.put(replace(table.rows[0], name="base nf4", kind="quantized", loss=4.0512))
    sure = replace(table.rows[2], exact_match=1.0, interval=(0.96, 1.0), name="export gguf-q4_k_m")
    table.put(sure)
    heading = " ".join(shown(table, width=120).splitlines()[0].split())
    assert heading == "model loss change recovery ppl KL top-1 JSON match p size tok/s"


def test_long_names_are_broken_and_not_cut(table: Table) -> None:
    name = "export compressed-tensors-w4a16"
    table.rows[2] = replace(table.rows[2], name=name)
    text = shown(table, width=100)
    assert "compressed-tensors-w4a16" in text and "12.3 GB" in text


def test_huge_and_missing_figures(table: Table) -> None:
    broken = replace(table.rows[0], loss=math.nan, perplexity=math.nan)
    worse = replace(table.rows[0], loss=20.5, perplexity=math.exp(20.5))
    text = shown(Table("x", [broken, worse]))
    assert "nan" in text and "8.0e+08" in text


def test_rows_of_several_metrics_have_a_score(table: Table) -> None:
    table.rows[0] = replace(table.rows[0], metric="number_match")
    assert " score " in shown(table).splitlines()[0]


def test_a_row_of_an_earlier_release_has_its_interval(table: Table) -> None:
    table.rows[1] = replace(table.rows[1], interval=None, metric=None)
    assert "87.0% (79-92)" in shown(table)


def test_scores_of_tasks_and_text(asked_table: Table) -> None:
    text = shown(asked_table)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    # 700 nats of 1000 bytes are 700 / ln 2 / 1000 bits
    assert "base 16-bit 1.0099 30.0% (21-40)* 31.5" in lines
    assert "adapter on nf4 0.9378 52.0% (42-62) 31.5" in lines
    assert "export bitsandbytes - - -" in lines
    assert any("gsm8k exact_match wikitext word_perplexity" in line for line in lines)
    assert "bits per byte of wiki.txt" in text and "* differs from adapter on nf4" in text


def test_scores_beyond_the_width_are_left_to_the_report(asked_table: Table) -> None:
    text = shown(asked_table, width=60)
    assert "bits per byte" in text and "word_perplexity" not in text
    assert "what does not fit here is in report.html" in " ".join(text.split())


@pytest.mark.parametrize("width", [60, 80, 120])
def test_nothing_is_wider_than_the_terminal(asked_table: Table, width: int) -> None:
    assert max(map(len, shown(asked_table, width=width).splitlines())) <= width


def test_the_effect_of_a_packed_cache_is_told() -> None:
    effect = CacheEffect(
        bits=4,
        context=2048,
        tokens=1855,
        loss=2.51,
        loss_16bit=2.5,
        kl=0.0123,
        top1=0.97,
        cache_bytes=3_000_000,
        cache_bytes_16bit=10_000_000,
    )
    text = shown(Table("adapter on nf4", kv_cache=effect), width=200)
    assert "in 4 bits, 2048 tokens: 3.0 MB instead of 10.0 MB, loss 2.5100" in text
