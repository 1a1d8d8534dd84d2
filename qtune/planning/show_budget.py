"""What the terminal shows of `qtune plan`: all forms, the one to take, and how it could grow."""

from rich import box
from rich.table import Table as Grid

from qtune.planning.budget import Budget, Wish
from qtune.planning.candidates import Candidate, undominated
from qtune.planning.footprint import Request
from qtune.progress import console, say


def budget(found: Budget, fragment: str) -> None:
    """Print the table of forms, the chosen one in detail, and its lines for a recipe."""
    console.print(_table(found))
    say(_legend(found))
    console.print()
    for name, text in _details(found).items():
        console.print(f"[bold]{name:<9}[/] ", end="")
        say(text)
    if found.wish is not None:
        console.print("[bold]better   [/] ", end="")
        say(_wish(found.wish))
    say("\nfor the recipe:\n")
    say(fragment)


def _table(found: Budget) -> Grid:
    grid = Grid(
        box=box.SIMPLE_HEAD if console.is_terminal else None, padding=(0, 1), pad_edge=False
    )
    grid.add_column("model")
    grid.add_column("form", no_wrap=True)
    for heading in ("bits", "of model", "weights", "needs", "loss", ""):
        grid.add_column(heading, justify="right", no_wrap=True)
    best = undominated(found.candidates)
    for place, candidate in enumerate(found.candidates):
        style = "bold" if candidate is found.chosen else None
        grid.add_row(*_cells(candidate, found.request, place in best), style=style)
    return grid


def _cells(candidate: Candidate, request: Request, undominated: bool) -> list[str]:
    sizes, policy = candidate.sizes, candidate.need.policy
    marks = ("*" if undominated else "") + ("" if candidate.fits(request) else " too large")
    return [
        candidate.footprint.label,
        candidate.name,
        f"{sizes.bits:.2f}",
        f"{sizes.model_bits:.2f}",
        _gib(sizes.total_bytes),
        _gib(candidate.need.total) + (f" {policy}" if policy else ""),
        f"{candidate.lost:+.3f}" + ("" if candidate.measured else "?"),
        marks.strip(),
    ]


def _legend(found: Budget) -> str:
    use = "in use" if found.request.serve else "in training"
    measured = any(candidate.measured for candidate in found.candidates)
    return (
        "Best first, in a family. Bits of a weight in quantized layers, scales included, and in "
        f"the whole model; bytes {use} of {found.request.batch} x {found.request.context} tokens"
        f"{'' if found.request.serve else ', with what the backward pass makes again'}; "
        "nats a token lost against the model's own 16-bit form"
        + (", measured" if measured else "")
        + ", ? as expected from other models. * nothing smaller is as good."
    )


def _details(found: Budget) -> dict[str, str]:
    chosen, request = found.chosen, found.request
    parts = {name: size for name, size in chosen.need.parts.items() if size}
    lines = {
        "take": f"{chosen.footprint.label} as {chosen.name}: {_gib(chosen.need.total)} of "
        f"{_gib(request.memory_bytes)}",
        "memory": ", ".join(f"{name} {_gib(size)}" for name, size in parts.items()),
    }
    if chosen.need.policy is not None:
        lines["recompute"] = chosen.need.policy
    lines["largest"] = (
        f"{found.most_rows} rows of {request.context} tokens, or {request.batch} of "
        f"{found.most_context}"
    )
    return lines


def _wish(wish: Wish) -> str:
    better = wish.candidate
    return (
        f"{better.footprint.label} as {better.name} needs {_gib(better.need.total)}; it fits with "
        f"{wish.change.words}"
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
