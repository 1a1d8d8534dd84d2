"""Write benchmarks/README.md from the results beside it.

    python benchmarks/report.py

The prose is README.template.md; tables take its places. The newest GPU results are shown; those of
the suite's quick mode are no measurements and never are. A test keeps the page current.
"""

import json
from pathlib import Path
from typing import Any

from cpu_tables import cpu_section
from gpu_tables import gpu_section
from speedup_plot import plot_speedups

from qtune.files import write_text

HERE = Path(__file__).parent
TEMPLATE, PAGE, PLOT = HERE / "README.template.md", HERE / "README.md", "speedup.svg"


def gpu_results(folder: Path) -> tuple[str, dict[str, Any]] | None:
    """The name and the content of the newest results of scripts/gpu_suite.py, if there are any."""
    found = [(path.name, data) for path, data in _files(folder) if "suite" in data]
    measured = [(name, data) for name, data in found if not data["quick"]]
    return max(measured, key=lambda it: it[1]["facts"]["time"], default=None)


def cpu_results(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """The other results by the names of their files."""
    return [(path.stem, data) for path, data in _files(folder) if "suite" not in data]


def page(folder: Path) -> str:
    """The text of README.md for the results in a folder."""
    newest = gpu_results(folder)
    gpu = gpu_section(*(newest or (None, None)))
    if newest is not None:
        gpu += f"\n\n![speed-up over rows]({PLOT})"
    cpu = "\n\n".join(cpu_section(name, data) for name, data in cpu_results(folder))
    text = TEMPLATE.read_text("utf-8")
    return text.replace("<!-- gpu -->", gpu).replace("<!-- cpu -->", cpu)


def main() -> None:
    """Write the page, and the chart where there are GPU results."""
    write_text(PAGE, page(HERE / "results"))
    newest = gpu_results(HERE / "results")
    if newest is not None:
        plot_speedups(newest[1]["parts"].get("kernels", {"rows": []})["rows"], HERE / PLOT)


def _files(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    return [(path, json.loads(path.read_text("utf-8"))) for path in sorted(folder.glob("*.json"))]


if __name__ == "__main__":
    main()
