import json
import math
from pathlib import Path

import pytest
import torch
import tune
from gpu import tiles
from gpu.tiles import GEMM, Job
from gpu.weights import random_weight

from qtune_kernels.tile_tables import DEFAULT, FOLDER, Tile, parse_table, read_table


def fake(job: Job) -> dict[str, dict[str, float]]:
    """The second candidate wins up to 128 rows, except for the widest shapes."""
    made = {}
    for shape in job.shapes:
        times = {
            tiles.name(tile): 10.0 + i for i, tile in enumerate(reversed(tiles.candidates(job)[:2]))
        }
        slow = job.rows > 128 or job.cut[1] is None
        made[f"{shape[0]}x{shape[1]}"] = {**times, GEMM: 1.0 if slow else 100.0}
    return made


def candidate(kind: str, bits: int) -> Tile:
    return tiles.candidates(Job(kind, bits, 128, (2048, 8191)))[1]


def table(entries: list[dict]) -> dict:
    return {**json.loads((FOLDER / DEFAULT).read_text()), "made_by": {}, "entries": entries}


def test_entries_make_a_whole_table() -> None:
    made = parse_table(table(tiles.entries(fake)))
    assert made.tile("forward", 4, 100, (4096, 4096)) == candidate("forward", 4)
    assert made.tile("backward", 2, 100, (4096, 4096)) == candidate("backward", 2)
    assert made.tile("forward", 4, 129, (4096, 4096)) is None
    # the dimension that tiles are cut from decides
    assert made.tile("forward", 4, 1, (8192, 4096)) is None
    assert made.tile("backward", 4, 1, (8192, 4096)) is not None


def test_what_lost_is_not_timed_again() -> None:
    seen: list[Job] = []

    def measure(job: Job) -> dict[str, dict[str, float]]:
        seen.append(job)
        return fake(job)

    tiles.entries(measure)
    wide = [job for job in seen if job.cut[1] is None and job.kind == "forward" and job.bits == 4]
    assert [job.rows for job in wide] == [8]


def test_ratios_count_and_not_microseconds() -> None:
    timings = {"small": {"a": 1.0, "b": 3.0}, "large": {"a": 100.0, "b": 60.0}}
    assert tiles.winner(timings) == "a"
    assert math.isclose(1.0 * 100.0, 100.0) and tiles.winner({"large": timings["large"]}) == "b"


@pytest.mark.parametrize("kind", tiles.ROWS)
def test_candidates_are_tiles_that_a_table_may_hold(kind: str) -> None:
    for job in [job for job in tiles.jobs() if job.kind == kind]:
        found = tiles.candidates(job)
        assert len(set(found)) == len(found) > 1
        assert all(not tile.few_rows or tile.rows >= job.rows for tile in found)


@pytest.mark.parametrize("kind", tiles.ROWS)
def test_what_is_timed_are_the_products(kind: str) -> None:
    weight = random_weight((48, 128), 4, 64, torch.device("cpu"))
    job = Job(kind, 4, 3, (1, 2047))
    (run,) = tiles.variants(job, [], [weight])[GEMM]
    assert run().shape == ((3, 48) if kind == "forward" else (3, 128))


def test_a_written_table_reads_back(tmp_path: Path) -> None:
    data = table(tiles.entries(fake))
    tune.write_table(tmp_path / "x.json", data)
    assert read_table(tmp_path / "x.json") == parse_table(data)
    assert json.loads((tmp_path / "x.json").read_text()) == data
    lines = (tmp_path / "x.json").read_text().splitlines()
    assert sum('"kind"' in line for line in lines) == len(data["entries"])


def test_a_wrong_table_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no entry serves"):
        tune.write_table(tmp_path / "x.json", table([]))
    assert list(tmp_path.iterdir()) == []


def test_files_are_named_after_gpus() -> None:
    assert tune.file_name("NVIDIA H200") == "nvidia-h200"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["tune.py"])
    assert tune.main() == 2
    assert capsys.readouterr().err.count("\n") == 1
