"""How long calls take: medians of many runs, over inputs in rotation, repeated in turn.

A variant is a list of calls that do the same work on different inputs. One run makes all of them,
so that nothing is found in the second-level cache that a training step would not find there. Small
calls are captured into a CUDA graph: what is compared is the work on the GPU and not Python's time
to launch it. Variants of a comparison are timed one after the other and then once more; the
distance of the two medians is the noise. On a CPU the clock of the host serves.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch

Calls = Sequence[Callable[[], Any]]
# several times the second-level cache of an H200, 60 MB
ROTATED_BYTES = 200_000_000
MOST_SETS = 32
REPEATS = 2
WARM_UP = 3


class Spent(NamedTuple):
    """Microseconds of one call: the median of runs and its quartiles."""

    median_us: float
    q1_us: float
    q3_us: float


def num_sets(bytes_each: int, quick: bool) -> int:
    """How many sets of inputs to rotate, given the bytes that one call reads."""
    return 2 if quick else min(MOST_SETS, max(2, -(-ROTATED_BYTES // bytes_each)))


def compare(
    variants: Mapping[str, Calls], device: torch.device, *, graph: bool, runs: int
) -> dict[str, dict[str, Any]]:
    """For each variant its median, quartiles, the medians of the repeats and their spread."""
    timers = {name: _timer(calls, device, graph) for name, calls in variants.items()}
    spent: dict[str, list[Spent]] = {name: [] for name in variants}
    for _ in range(REPEATS):
        for name, timer in timers.items():
            spent[name].append(_summary(timer(runs), len(variants[name])))
    return {name: _figures(repeats) for name, repeats in spent.items()}


def _summary(runs_us: Sequence[float], num_calls: int) -> Spent:
    each = [spent / num_calls for spent in runs_us]
    low, _, high = quantiles(each, n=4)
    return Spent(median(each), low, high)


def _figures(repeats: Sequence[Spent]) -> dict[str, Any]:
    medians = [repeat.median_us for repeat in repeats]
    return {
        "median_us": median(medians),
        "q1_us": min(repeat.q1_us for repeat in repeats),
        "q3_us": max(repeat.q3_us for repeat in repeats),
        "repeats_us": medians,
        "spread": max(medians) / min(medians) - 1,
    }


def _timer(calls: Calls, device: torch.device, graph: bool) -> Callable[[int], list[float]]:
    """What times that many runs, in microseconds each."""
    if device.type != "cuda":
        _run(calls)
        return lambda runs: [_host_us(calls) for _ in range(runs)]
    run = _captured(calls) if graph else lambda: _run(calls)
    for _ in range(WARM_UP):
        run()
    return lambda runs: _device_us(run, runs)


def _run(calls: Calls) -> None:
    for call in calls:
        call()


def _host_us(calls: Calls) -> float:
    start = time.perf_counter()
    _run(calls)
    return (time.perf_counter() - start) * 1e6


def _captured(calls: Calls) -> Callable[[], None]:
    """Replay of the calls as one graph; they are warmed up on a stream of their own first."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            _run(calls)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _run(calls)
    return graph.replay


def _device_us(run: Callable[[], None], runs: int) -> list[float]:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
    torch.cuda.synchronize()
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) * 1e3 for before, after in pairwise(marks)]
