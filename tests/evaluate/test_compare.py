import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from qtune.errors import UserError
from qtune.evaluate.compare import Merge, Row, Table, make_row, print_table, read, write
from qtune.evaluate.exact_match import Score
from qtune.evaluate.generate import Answers
from qtune.evaluate.long_context import CacheEffect
from qtune.evaluate.perplexity import Likelihood

BASE = Row(
    name="base 16-bit",
    kind="base",
    loss=3.25,
    perplexity=25.79,
    tokens=4321,
    kl=2.8125,
    top1=0.4567,
    exact_match=0.0,
    answers=100,
    size_bytes=269_060_552,
    tokens_per_s=304.26,
    consumer="transformers",
)
TUNED = replace(
    BASE, name="adapter on nf4", kind="adapter", loss=0.0512, perplexity=1.0525, kl=None, top1=None,
    exact_match=0.87, size_bytes=105_000_000, consumer=None, exact=True,
)  # fmt: skip
EXPORT = replace(
    TUNED, name="export bitsandbytes", kind="export", kl=0.0004, top1=0.9993, tokens_per_s=None,
    exact_match=None, answers=0, size_bytes=12_345_678_901,
)  # fmt: skip
TABLE = Table("adapter on nf4", [BASE, TUNED, EXPORT], Merge("original", "0.05 against 0.06"))


def shown(table: Table, *, width: int = 100, terminal: bool = False) -> str:
    out = io.StringIO()
    print_table(Console(file=out, width=width, force_terminal=terminal), table)
    return out.getvalue()


@pytest.mark.parametrize("table", [TABLE, Table("adapter on nf4")])
def test_what_is_written_is_read(table: Table, tmp_path: Path) -> None:
    write(table, tmp_path / "eval.json")
    assert read(tmp_path / "eval.json") == table
    assert [path.name for path in tmp_path.iterdir()] == ["eval.json"]


def test_keys_of_the_file(tmp_path: Path) -> None:
    write(TABLE, tmp_path / "eval.json")
    content = json.loads((tmp_path / "eval.json").read_text())
    assert set(content) == {"trained", "rows", "merge", "kv_cache"}
    assert content["merge"] == {"chosen": "original", "why": "0.05 against 0.06"}
    assert content["rows"][0] == {
        "name": "base 16-bit", "kind": "base", "loss": 3.25, "perplexity": 25.79, "tokens": 4321,
        "kl": 2.8125, "top1": 0.4567, "exact_match": 0.0, "answers": 100,
        "size_bytes": 269060552, "tokens_per_s": 304.26, "consumer": "transformers", "exact": None,
    }  # fmt: skip


def test_figures_without_end_are_null_in_the_file(tmp_path: Path) -> None:
    broken = replace(BASE, loss=math.nan, perplexity=math.inf, kl=math.inf)
    write(Table("x", [broken]), tmp_path / "eval.json")
    text = (tmp_path / "eval.json").read_text()
    # strict readers, such as a browser, know neither
    assert "NaN" not in text and "Infinity" not in text
    (row,) = read(tmp_path / "eval.json").rows
    assert math.isnan(row.loss) and math.isnan(row.perplexity) and row.kl is None


def test_earlier_file_outlives_a_failed_write(tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    write(TABLE, path)
    with pytest.raises(TypeError):
        write(Table("x", [replace(BASE, consumer=object())]), path)  # type: ignore[arg-type]
    assert read(path) == TABLE


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"rows": []}',
        '{"trained": "x", "merge": null, "rows": [{"name": 1}]}',
    ],
)
def test_damaged_file(text: str, tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"not a table of qtune.*qtune eval"):
        read(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"eval\.json: no such file; `qtune eval"):
        read(tmp_path / "eval.json")


def test_row_from_measurements() -> None:
    row = make_row(
        "export bf16",
        "export",
        Likelihood(loss=0.5, tokens=10, kl=0.1, top1=0.9, compared=8),
        size_bytes=5,
        score=Score([True, False, True, True]),
        answers=Answers(["a"] * 4, num_tokens=30, seconds=2.0),
        consumer="transformers",
        exact=False,
    )
    assert row == Row(
        name="export bf16", kind="export", loss=0.5, perplexity=math.exp(0.5), tokens=10, kl=0.1,
        top1=0.9, exact_match=0.75, answers=4, size_bytes=5, tokens_per_s=15.0,
        consumer="transformers", exact=False,
    )  # fmt: skip


def test_row_without_answers() -> None:
    row = make_row("base", "base", Likelihood(loss=0.5, tokens=10), size_bytes=5)
    assert (row.kl, row.top1, row.exact_match, row.answers) == (None, None, None, 0)
    assert row.tokens_per_s is None


def test_table_in_a_file_is_plain_and_fits() -> None:
    text = shown(TABLE)
    assert "\x1b" not in text and text.isascii()
    lines = [line.rstrip() for line in text.splitlines()]
    assert max(map(len, lines)) <= 100
    assert lines[0].split("  ")[0] == "model"
    assert [" ".join(line.split()) for line in lines[1:4]] == [
        "base 16-bit 3.2500 25.790 2.8125 45.7% 0.0% (0-4) 269.1 MB 304.3",
        "adapter on nf4 0.0512 1.052 - - 87.0% (79-92) 105.0 MB 304.3",
        "export bitsandbytes 0.0512 1.052 0.0004 99.9% - 12.3 GB -",
    ]
    legend = " ".join(lines[4:])
    assert "4321 held-out tokens" in legend and "against adapter on nf4" in legend
    assert "100 answers" in legend


def test_table_in_a_terminal_marks_the_trained_model() -> None:
    (line,) = [
        line for line in shown(TABLE, terminal=True).splitlines() if "adapter on nf4 " in line
    ]
    assert "\x1b[1m" in line


def test_no_figure_is_cut_at_80_columns() -> None:
    text = shown(TABLE, width=80)
    for figure in ("25.790", "2.8125", "45.7%", "87.0% (79-92)", "269.1 MB", "304.3"):
        assert figure in text


def test_huge_and_missing_figures() -> None:
    broken = replace(BASE, loss=math.nan, perplexity=math.nan)
    worse = replace(BASE, loss=20.5, perplexity=math.exp(20.5))
    text = shown(Table("x", [broken, worse]))
    assert "nan" in text and "8.0e+08" in text


def test_the_effect_of_a_packed_cache_is_kept_and_told(tmp_path):
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
    write(Table("adapter on nf4", kv_cache=effect), tmp_path / "eval.json")
    table = read(tmp_path / "eval.json")
    assert table.kv_cache == effect
    shown = io.StringIO()
    print_table(Console(file=shown, width=200), table)
    assert "in 4 bits, 2048 tokens: 3.0 MB instead of 10.0 MB, loss 2.5100" in shown.getvalue()
