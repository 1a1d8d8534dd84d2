import json
import math
from dataclasses import replace

import pytest

from qtune.comparing.comparison import COLUMNS, Comparison, Line, cells, markdown, read, write
from qtune.errors import UserError

DENSE = Line(
    name="16-bit",
    method="nearest",
    settings="x",
    bits=16.0,
    model_bits=16.0,
    size_bytes=2_000_000,
    adapter_bytes=0,
    loss=3.0,
    perplexity=20.1,
    nats=0.0,
    standard_error=0.0,
    kl=0.0,
    top1=1.0,
    exact_match=0.5,
    answers=10,
    seconds=1.5,
)
INT2 = replace(
    DENSE, name="int2", bits=2.2, model_bits=5.0, loss=13.0, perplexity=4.4e5, nats=10.0,
    standard_error=0.25, kl=10.1, top1=0.015, exact_match=None, adapter_bytes=500_000,
)  # fmt: skip
ON = {"model": "m", "held_out_sha256": "ab"}


def test_lines_come_back(tmp_path):
    made = Comparison(ON)
    made.put(INT2)
    made.put(DENSE)
    made.put(replace(INT2, loss=math.inf, nats=math.nan))
    assert [it.name for it in made.lines] == ["16-bit", "int2"]
    write(made, tmp_path / "compare.json")
    found = read(tmp_path / "compare.json", ON)
    assert found.lines[0] == DENSE and math.isnan(found.lines[1].nats)
    assert found.find("16-bit", "x") == DENSE and found.find("16-bit", "y") is None
    assert read(tmp_path / "none.json", ON).lines == []


def test_another_comparison_is_refused(tmp_path):
    path = tmp_path / "compare.json"
    write(Comparison(ON), path)
    with pytest.raises(UserError, match=r"something else \(held_out_sha256 differ\)"):
        read(path, ON | {"held_out_sha256": "cd"})
    for text in ("", "[]", json.dumps({"measured_on": ON, "lines": [{"x": 1}]})):
        path.write_text(text)
        with pytest.raises(UserError, match="not a table of qtune compare"):
            read(path, ON)


def test_cells_of_every_column():
    assert cells(DENSE) == [
        *("16-bit", "16.00", "16.00", "2.0", "20.10", "-", "0.0000", "100.0%", "50% of 10")
    ]
    assert cells(INT2) == [
        *("int2", "2.20", "5.00", "2.5", "4.4e+05", "+10.0000 ± 0.2500", "10.1000", "1.5%", "-")
    ]


def test_markdown_has_a_row_for_each():
    rows = markdown([DENSE, INT2]).splitlines()
    assert len(rows) == 4
    assert {row.count("|") for row in rows} == {len(COLUMNS) + 1}
    assert rows[1].startswith("| --- | ---: |") and rows[3].startswith("| int2 | 2.20 |")
