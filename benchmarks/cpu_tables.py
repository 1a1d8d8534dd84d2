"""Tables of what the benchmarks for the CPU wrote, whichever wrote it.

Results are cases with variants each. Where every variant has one time, cases become lines and
variants columns, with the ratio to the first. Else each case is a table of its variants, with a
column for each of their figures. Results that are a list of rows are a table as they are.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from cells import figure, ratio, table

HIDDEN = ("environment", "variants")
WIDE = "Milliseconds, median (quartiles), and their ratio to the first variant's: less is faster."


def cpu_section(name: str, report: Mapping[str, Any]) -> str:
    """A section on one file of results."""
    if "rows" in report:
        body = [_rows_table(report["rows"])]
    elif _has_one_time(report["cases"]):
        body = [WIDE, _wide(report["cases"])]
    else:
        body = [part for case in report["cases"] for part in _long(case)]
    first = next(iter(report.get("cases", ())), {})
    facts = [report.get("environment") or first.get("environment", {}), report.get("settings", {})]
    return "\n\n".join([f"### {name}", *(word for it in facts for word in _words(it)), *body])


def _has_one_time(cases: Sequence[Mapping[str, Any]]) -> bool:
    return all("median_ms" in it for case in cases for it in case["variants"].values())


def _wide(cases: Sequence[Mapping[str, Any]]) -> str:
    keys = [key for key in cases[0] if key not in HIDDEN]
    rows = []
    for case in cases:
        first = next(iter(case["variants"].values()))["median_ms"]
        cells = [str(case[key]) for key in keys]
        for number, it in enumerate(case["variants"].values()):
            spread = f"{figure(it['median_ms'])} ({figure(it['q1_ms'])}-{figure(it['q3_ms'])})"
            cells.append(f"{spread} {ratio(it['median_ms'] / first)}" if number else spread)
        rows.append(cells)
    return table([*keys, *cases[0]["variants"]], rows)


def _long(case: Mapping[str, Any]) -> list[str]:
    """What the case is, and its table."""
    rows = [{"variant": name, **figures} for name, figures in case["variants"].items()]
    facts = {key: value for key, value in case.items() if key not in HIDDEN}
    return [*_words(facts), _rows_table(rows)]


def _rows_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with their figures; lists of single measurements are left to the file."""
    keys = [key for key, value in rows[0].items() if not isinstance(value, list)]
    return table(keys, [[_cell(row.get(key)) for key in keys] for row in rows])


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{figure(value['median'])} ({figure(value['q1'])}-{figure(value['q3'])})"
    if isinstance(value, float):
        return figure(value)
    return "" if value is None else str(value)


def _words(facts: Mapping[str, Any]) -> list[str]:
    """A line on what figures depend on, if there is anything to say."""
    found = dict(facts)
    found |= found.pop("packages", {})
    words = [f"{key} {_cell(value)}" for key, value in found.items() if value is not None]
    return [", ".join(words) + "."] if words else []
