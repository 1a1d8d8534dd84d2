"""What a spike is, when patience ends, and that a resumed watch decides alike."""

import json
import math
from typing import Any

import pytest

from qtune.recipe import Train
from qtune.train.watch import LEAST, WINDOW, Verdict, Watch


def watch(state: dict[str, Any] | None = None, **options: Any) -> Watch:
    return Watch(Train(**{"steps": 1, "spike_factor": 10.0, **options}), state or {})


def spikes(norms: list[float], **options: Any) -> list[int]:
    watched = watch(**options)
    return [i for i, norm in enumerate(norms) if watched.is_spike(norm)]


def test_only_a_norm_far_over_the_median_is_a_spike() -> None:
    assert spikes([1.0] * 20 + [9.9, 1.0, 10.1, 1.0, 500.0]) == [22, 24]


def test_the_first_norms_are_never_spikes() -> None:
    assert spikes([1.0, 100.0] + [1.0] * (LEAST - 3) + [1000.0]) == []
    assert spikes([1.0] * LEAST + [1000.0]) == [LEAST]


def test_a_norm_that_stays_high_becomes_the_normal_one() -> None:
    found = spikes([1.0] * WINDOW + [100.0] * WINDOW)
    assert found == list(range(WINDOW, WINDOW + WINDOW // 2))


def test_no_factor_no_spikes() -> None:
    watched = watch(spike_factor=None)
    assert not any(watched.is_spike(norm) for norm in [1.0] * 20 + [1e9])
    assert watched.state()["norms"] == [] and watched.num_spikes == 0


def test_best_and_patience() -> None:
    watched = watch(patience=2)
    losses = [2.0, 1.5, 1.6, 1.4, 1.4, math.nan]
    verdicts = [watched.evaluated(10 * i, loss) for i, loss in enumerate(losses)]
    assert [v.best for v in verdicts] == [True, True, False, True, False, False]
    assert [v.stop for v in verdicts] == [False] * 5 + [True]
    assert (watched.best_loss, watched.best_step) == (1.4, 30)


def test_without_patience_it_never_stops() -> None:
    watched = watch()
    assert watched.evaluated(1, 1.0) == Verdict(best=True, stop=False)
    assert not any(watched.evaluated(step, 2.0).stop for step in range(100))


def test_what_is_no_number_is_never_the_best() -> None:
    watched = watch()
    assert not watched.evaluated(1, math.nan).best
    assert watched.evaluated(2, 5.0).best


@pytest.mark.parametrize("at", [0, 3, 14, 60])
def test_a_resumed_watch_decides_alike(at: int) -> None:
    norms = [1.0 + 0.1 * (i % 7) + 40 * (i % 13 == 12) for i in range(80)]
    losses = [2.0 - 0.01 * (i % 20) for i in range(80)]

    def go_on(watched: Watch, start: int, end: int) -> list[Any]:
        return [
            (watched.is_spike(norms[i]), watched.evaluated(i, losses[i])) for i in range(start, end)
        ]

    whole, first = watch(patience=7), watch(patience=7)
    expected = go_on(whole, 0, 80)
    begun = go_on(first, 0, at)
    resumed = watch(json.loads(json.dumps(first.state())), patience=7)
    assert begun + go_on(resumed, at, 80) == expected
    assert resumed.state() == whole.state() and resumed.num_spikes > 3
