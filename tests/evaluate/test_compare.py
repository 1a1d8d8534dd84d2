import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from qtune.errors import UserError
from qtune.evaluate.compare import Table, read, write
from qtune.evaluate.long_context import CacheEffect


def test_what_is_written_is_read(table: Table, asked_table: Table, tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    for one in (table, asked_table, Table("adapter on nf4")):
        write(one, path)
        assert read(path) == one
    assert [path.name for path in tmp_path.iterdir()] == ["eval.json"]


def test_keys_of_the_file(table: Table, tmp_path: Path) -> None:
    write(table, tmp_path / "eval.json")
    content = json.loads((tmp_path / "eval.json").read_text())
    assert set(content) == {"trained", "rows", "merge", "kv_cache"}
    assert content["merge"] == {"chosen": "original", "why": "0.05 against 0.06"}
    assert content["rows"][0] == {
        "name": "base 16-bit", "kind": "base", "loss": 3.25, "perplexity": 25.79, "tokens": 4321,
        "kl": 2.8125, "top1": 0.4567, "nats": 3.1988, "standard_error": 0.0412, "recovery": None,
        "exact_match": 0.0, "metric": "json_match", "interval": [0.0, 0.037], "p_value": 0.0,
        "fields": {}, "answers": 100, "tasks": [], "text": None,
        "size_bytes": 269060552, "tokens_per_s": 304.26, "consumer": "transformers", "exact": None,
    }  # fmt: skip


def test_scores_and_text_in_the_file(asked_table: Table, tmp_path: Path) -> None:
    write(asked_table, tmp_path / "eval.json")
    row = json.loads((tmp_path / "eval.json").read_text())["rows"][0]
    assert row["tasks"][0] == {
        "task": "gsm8k", "metric": "exact_match", "value": 0.3, "standard_error": 0.05,
        "interval": [0.21, 0.4], "num": 100,
        "p_value": 0.002,
    }  # fmt: skip
    assert row["text"]["nats"] == 700.0 and row["text"]["bytes"] == 1000


def test_files_of_earlier_releases_are_read(tmp_path: Path) -> None:
    old = {
        "name": "base 16-bit", "kind": "base", "loss": 3.25, "perplexity": 25.79, "tokens": 4321,
        "kl": None, "top1": None, "exact_match": 0.5, "answers": 100, "size_bytes": 5,
        "tokens_per_s": 304.26, "consumer": "transformers", "exact": None,
    }  # fmt: skip
    content = {"trained": "x", "rows": [old], "merge": None}
    (tmp_path / "eval.json").write_text(json.dumps(content))
    (row,) = read(tmp_path / "eval.json").rows
    assert (row.exact_match, row.answers, row.tasks, row.text) == (0.5, 100, (), None)


def test_figures_without_end_are_null_in_the_file(table: Table, tmp_path: Path) -> None:
    broken = replace(table.rows[0], loss=math.nan, perplexity=math.inf, kl=math.inf)
    write(Table("x", [broken]), tmp_path / "eval.json")
    text = (tmp_path / "eval.json").read_text()
    # strict readers, such as a browser, know neither
    assert "NaN" not in text and "Infinity" not in text
    (row,) = read(tmp_path / "eval.json").rows
    assert math.isnan(row.loss) and math.isnan(row.perplexity) and row.kl is None


def test_earlier_file_outlives_a_failed_write(table: Table, tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    write(table, path)
    with pytest.raises(TypeError):
        write(Table("x", [replace(table.rows[0], consumer=object())]), path)  # type: ignore[arg-type]
    assert read(path) == table


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


def test_the_effect_of_a_packed_cache_is_kept(tmp_path: Path) -> None:
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
    assert read(tmp_path / "eval.json").kv_cache == effect
