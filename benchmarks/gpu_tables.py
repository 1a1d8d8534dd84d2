"""Tables of what scripts/gpu_suite.py measured, beside the goals that were set before.

A ratio is the peer's time over ours: more than 1 is faster. What was not measured stays empty.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from statistics import geometric_mean
from typing import Any, NamedTuple

from cells import figure, ratio, table

NONE_YET = (
    "No GPU was at hand: nothing below has been timed, and the columns for it are empty until "
    "`scripts/gpu_suite.py` has run on one."
)
Rows = Sequence[Mapping[str, Any]]
BITSANDBYTES, PEFT, UNSLOTH = "bitsandbytes", "peft + bitsandbytes", "unsloth's calls"


class Goal(NamedTuple):
    """What must be reached, and how it is read off the rows of a part."""

    name: str
    what: str
    must: str
    measured: Callable[[Rows], float | None]


def _speedups(goal: str, peer: str = BITSANDBYTES, **wanted: Any) -> Callable[[Rows], list[float]]:
    """The ratios of a goal's rows that have these values."""

    def find(rows: Rows) -> list[float]:
        own = [row for row in rows if row.get("goal") == goal and row["ok"]]
        own = [row for row in own if all(row.get(key) == it for key, it in wanted.items())]
        sides = [row["variants"] for row in own if peer in row["variants"]]
        return [it[peer]["median_us"] / next(iter(it.values()))["median_us"] for it in sides]

    return find


def _mean(find: Callable[[Rows], list[float]]) -> Callable[[Rows], float | None]:
    return lambda rows: geometric_mean(found) if (found := find(rows)) else None


def _least(find: Callable[[Rows], list[float]]) -> Callable[[Rows], float | None]:
    return lambda rows: min(find(rows), default=None)


def _step(field: str, ours: tuple[str, str], theirs: tuple[str, str]) -> Callable[..., Any]:
    """The ratio of a figure of two ways to train, ours over theirs."""

    def find(rows: Rows) -> float | None:
        ways = {(row.get("variant"), row.get("recompute")): row for row in rows if row.get("ok")}
        if ours not in ways or theirs not in ways or not ways[theirs][field]:
            return None
        return ways[ours][field] / ways[theirs][field]

    return find


def _speed(peer: str, ours: str, theirs: str) -> Callable[[Rows], float | None]:
    return _step("tokens_per_s", ("qtune", ours), (peer, theirs))


def _peak(peer: str) -> Callable[[Rows], float | None]:
    return _step("peak_bytes", ("qtune", "all"), (peer, "all"))


GOALS = (
    Goal("K1", "dequantize NF4", "1.5x, same bits", _mean(_speedups("K1"))),
    Goal("K2", "forward, 1 row", "1.15x", _mean(_speedups("K2"))),
    Goal("K3", "forward, 2 to 16 rows", "2x", _mean(_speedups("K3"))),
    Goal("K4", "forward, 32 to 256 rows", "1.7x", _mean(_speedups("K4", kind="forward"))),
    Goal("K4", "backward, 32 to 256 rows", "1.7x", _mean(_speedups("K4", kind="backward"))),
    Goal("K5", "1024 rows", "1.05x", _mean(_speedups("K5"))),
    Goal("K6", "4096 rows", "1.02x", _mean(_speedups("K6", rows=4096))),
    Goal("K6", "8192 rows", "1x", _mean(_speedups("K6", rows=8192))),
    Goal("K6", "4096 and 8192 rows, the least", "0.98x", _least(_speedups("K6"))),
    Goal("K7", f"LoRA layer, against {PEFT}", "1.2x", _mean(_speedups("K7", PEFT))),
    Goal("K7", f"LoRA layer, against {UNSLOTH}", "1.05x", _mean(_speedups("K7", UNSLOTH))),
    Goal("K8", "INT8 layer, 4096 rows", "1.2x", _mean(_speedups("K8"))),
    Goal("K9", "INT4 against our NF4, 1 row", "1.4x", _mean(_speedups("K9", "qtune nf4"))),
    Goal("S1", f"training step, against {PEFT}", "1.4x", _speed(PEFT, "all", "all")),
    Goal("S2", f"against {UNSLOTH}, all recomputed", "1.03x", _speed(UNSLOTH, "all", "all")),
    Goal("S2", f"against {UNSLOTH}, nothing recomputed", "1.03x", _speed(UNSLOTH, "none", "none")),
    Goal(
        "S3", f"nothing recomputed, against {UNSLOTH}, all", "1.3x", _speed(UNSLOTH, "none", "all")
    ),
    Goal("P1", f"peak memory over that of {UNSLOTH}", "at most 1x", _peak(UNSLOTH)),
    Goal("P1", f"peak memory over that of {PEFT}", "at most 0.75x", _peak(PEFT)),
)


def gpu_section(name: str | None, report: Mapping[str, Any] | None) -> str:
    """Everything on one file of results; without one, the goals alone."""
    if report is None:
        return f"{NONE_YET}\n\n{_goals(())}"
    parts = {part: found["rows"] for part, found in report["parts"].items()}
    sections = [
        f"`results/{name}`: {_machine(report['facts'])}",
        _counts(parts),
        _goals(list(chain(parts.get("kernels", ()), parts.get("steps", ())))),
        *_products(parts.get("kernels", ())),
        *_steps(parts.get("steps", ())),
        *_quickstart(parts.get("quickstart", ())),
    ]
    return "\n\n".join(sections)


def _goals(rows: Rows) -> str:
    lines = [(goal.name, goal.what, goal.must, ratio(goal.measured(rows))) for goal in GOALS]
    return table(("goal", "what", "must", "measured"), lines)


def _machine(facts: Mapping[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    driver = facts.get("gpu", {}).get("driver", "")
    return f"{facts['device']}, driver {driver}, {packages}, commit {facts['commit']}."


def _counts(parts: Mapping[str, Rows]) -> str:
    """A line for each part: how many cases were right, wrong and left out."""
    rows = []
    for part, found in parts.items():
        skipped = sum("skipped" in row for row in found)
        right = sum(bool(row.get("ok")) for row in found)
        rows.append((part, str(right), str(len(found) - right - skipped), str(skipped)))
    return table(("part", "right", "failed", "skipped"), rows)


def _products(rows: Rows) -> Iterable[str]:
    """Microseconds of products with NF4, ours and bitsandbytes', by shape and rows."""
    for kind in ("forward", "backward"):
        own = [r for r in rows if r.get("kind") == kind and BITSANDBYTES in r.get("variants", ())]
        if own:
            yield f"NF4, {kind}, microseconds (spread of two repeats):"
            heads = ("O x I", "rows", "qtune", BITSANDBYTES, "ratio")
            yield table(heads, [_product(row) for row in own])


def _product(row: Mapping[str, Any]) -> list[str]:
    sides = [row["variants"]["qtune"], row["variants"][BITSANDBYTES]]
    cells = [f"{figure(it['median_us'])} ({it['spread']:.0%})" for it in sides]
    return [f"{row['out']}x{row['in']}", str(row["rows"]), *cells, ratio(row["speedup"])]


def _steps(rows: Rows) -> Iterable[str]:
    own = [row for row in rows if "tokens_per_s" in row]
    if own:
        yield "A training step of a Llama 3 8B with 8 blocks, 2 x 4096 tokens:"
        heads = ("variant", "recompute", "tokens/s", "step, ms (quartiles)", "peak GiB", "losses")
        yield table(heads, [_step_cells(row) for row in own])


def _step_cells(row: Mapping[str, Any]) -> list[str]:
    step = row["step_ms"]
    peak = row["peak_bytes"]
    return [
        row["variant"],
        row["recompute"],
        figure(row["tokens_per_s"]),
        f"{figure(step['median'])} ({figure(step['q1'])}-{figure(step['q3'])})",
        "" if peak is None else figure(peak / 2**30),
        f"{row['first_loss']:.3f} to {row['last_loss']:.3f}",
    ]


def _quickstart(rows: Rows) -> Iterable[str]:
    for row in rows:
        if "exact_match" in row:
            speed = f"{figure(row['train_tokens_per_s'])} tokens/s in training"
            end = f"{row['exact_match']:.0%} exact match of {row['answers']} answers"
            yield f"The quickstart: {figure(row['seconds'])} s in all, {speed}, {end}."
