import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qtune_kernels import tile_tables
from qtune_kernels.tile_tables import (
    DEFAULT,
    FOLDER,
    KINDS,
    WIDTHS,
    Table,
    choose_table,
    parse_table,
    read_all,
    read_table,
    table_of,
)

TABLES = read_all(FOLDER)


@pytest.fixture
def data() -> dict[str, Any]:
    return json.loads((FOLDER / DEFAULT).read_text())


def table(*devices: str, capability: str | None = None) -> Table:
    return TABLES[DEFAULT]._replace(devices=devices, capability=capability)


def test_the_default_says_that_it_was_never_timed() -> None:
    assert TABLES[DEFAULT].source == "model of an H200, never timed"
    assert not TABLES[DEFAULT].devices and TABLES[DEFAULT].capability is None


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [(1, 128), (4096, 14336), (1 << 18, 1 << 16)])
def test_every_product_is_served(name: str, kind: str, bits: int, shape: tuple[int, int]) -> None:
    tiles = [TABLES[name].tile(kind, bits, rows, shape) for rows in (1, 17, 300, 1 << 20)]
    assert all(tile is None or not tile.few_rows for tile in tiles[1:])


def test_measured_tables_name_their_gpu_and_their_measurements() -> None:
    for name in TABLES.keys() - {DEFAULT}:
        data = json.loads((FOLDER / name).read_text())
        assert data["devices"] and data["capability"] and data["made_by"], name
        assert all("us" in entry for entry in data["entries"] if entry["tile"] is not None), name


def test_the_first_entry_that_fits_serves(data: dict[str, Any]) -> None:
    entries = data["entries"]
    served = next(e for e in entries if (e["kind"], e["most_rows"]) == ("forward", 256))
    wide = {**served, "out_features": [8192, None], "tile": None}
    changed = parse_table({**data, "entries": [wide, *entries]})
    assert changed.tile("forward", 4, 100, (8191, 4096)) is not None
    assert changed.tile("forward", 4, 100, (8192, 4096)) is None
    assert changed.tile("backward", 4, 100, (8192, 4096)) is not None


def test_a_gpu_gets_its_own_table_then_a_relatives_then_the_default() -> None:
    tables = {
        DEFAULT: table(),
        "a.json": table("GPU A", capability="9.0"),
        "b.json": table("GPU B", "GPU C", capability="9.0"),
    }
    assert choose_table(tables, "GPU C", "9.0") is tables["b.json"]
    assert choose_table(tables, "GPU D", "9.0") is tables["a.json"]
    assert choose_table(tables, "GPU D", "8.0") is tables[DEFAULT]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_default_serves() -> None:
    assert table_of() == table_of(torch.device("cpu")) == TABLES[DEFAULT]


def test_the_gpu_is_asked_for_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = (FOLDER / DEFAULT).read_text()
    (tmp_path / DEFAULT).write_text(text)
    own = text.replace('"devices": []', '"devices": ["GPU A"]').replace("264", "100")
    (tmp_path / "a.json").write_text(own)
    monkeypatch.setattr(tile_tables, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "GPU A")
    table_of.cache_clear()
    try:
        assert table_of().programs == 100
    finally:
        table_of.cache_clear()


WRONG = {
    "missing entries": lambda d: d.pop("entries"),
    "unknown author": lambda d: d.update(author="x"),
    "must be an object": lambda d: d["entries"].append(3),
    "entries must be a list": lambda d: d.update(entries={}),
    "entry 0: kind": lambda d: d["entries"][0].update(kind="sideways"),
    "entry 0: bits": lambda d: d["entries"][0].update(bits=[4, 5]),
    "entry 1: most_rows": lambda d: d["entries"][1].update(most_rows=0),
    "entry 0: out_features": lambda d: d["entries"][0].update(out_features=[1]),
    "must end at 9 or more": lambda d: d["entries"][0].update(in_features=[9, 8]),
    "entry 0: unknown row": lambda d: d["entries"][0]["tile"].update(row=8),
    "warps .3. must be a power of two": lambda d: d["entries"][0]["tile"].update(warps=3),
    "few_rows: most_rows must be at most": lambda d: d["entries"][0].update(most_rows=9),
    "few_rows exists in the forward": lambda d: d["entries"][0].update(kind="backward"),
    "entry 2 is never reached: entry 1": lambda d: d["entries"].insert(1, d["entries"][1]),
    "no entry serves every backward of 2 bits": lambda d: d["entries"].pop(),
    "programs .True. must be": lambda d: d.update(programs=True),
    "capability .9.0. must be text": lambda d: d.update(capability=9.0),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_is_said(message: str, data: dict[str, Any]) -> None:
    wrong = copy.deepcopy(data)
    WRONG[message](wrong)
    with pytest.raises(ValueError, match=message):
        parse_table(wrong)


def test_the_error_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"x\.json: .*scripts/tune\.py"):
        read_table(path)
