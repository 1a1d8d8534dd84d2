"""Tables and figures as Markdown has them."""

from collections.abc import Iterable, Sequence


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a cell with nothing in it stays empty."""
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines)


def figure(value: float) -> str:
    """A number in about three digits."""
    if value == 0 or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.2g}"


def ratio(value: float | None) -> str:
    """`1.23x`, or nothing where it was not measured."""
    return "" if value is None else f"{value:.2f}x"
