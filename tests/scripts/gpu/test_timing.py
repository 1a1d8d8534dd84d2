import pytest
import torch
from gpu import timing

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("bytes_each", "quick", "sets"),
    [(10_000_000, False, 20), (1_000, False, timing.MOST_SETS), (10**9, False, 2), (1, True, 2)],
)
def test_sets_outgrow_the_cache(bytes_each: int, quick: bool, sets: int) -> None:
    assert timing.num_sets(bytes_each, quick) == sets


def test_a_call_is_a_part_of_its_run() -> None:
    assert timing._summary([100.0, 200.0, 300.0], num_calls=2) == (100.0, 50.0, 150.0)


def test_the_distance_of_the_repeats_is_the_spread() -> None:
    found = timing._figures([timing.Spent(10.0, 9.0, 11.0), timing.Spent(12.0, 8.0, 13.0)])
    assert found["median_us"] == 11.0 and found["repeats_us"] == [10.0, 12.0]
    assert (found["q1_us"], found["q3_us"]) == (8.0, 13.0)
    assert found["spread"] == pytest.approx(0.2)


def test_every_call_of_every_variant_runs_in_every_run() -> None:
    counts = {"a": [0, 0], "b": [0]}

    def call(name: str, index: int):
        def run() -> None:
            counts[name][index] += 1

        return run

    calls = {name: [call(name, i) for i in range(len(own))] for name, own in counts.items()}
    found = timing.compare(calls, CPU, graph=True, runs=3)
    assert list(found) == ["a", "b"]
    # once before, then the runs of each repeat
    assert counts == {"a": [1 + 3 * timing.REPEATS] * 2, "b": [1 + 3 * timing.REPEATS]}
