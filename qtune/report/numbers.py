"""Numbers as the page shows them.

Memory is counted in GiB as the plan and the bar do, files in MB as disks are sold. A value that was
not measured is a dash. Spaces between a number and its unit are narrow and do not break.
"""

DASH = "\N{EN DASH}"
SPACE = "\N{NARROW NO-BREAK SPACE}"


def decimal(value: float | None, places: int = 4) -> str:
    """A number with fixed places; one too small for them is shown as below the last of them."""
    if value is None:
        return DASH
    smallest = 10**-places
    if 0 < value < smallest / 2:
        return f"<{SPACE}{smallest:.{places}f}"
    return f"{value:,.{places}f}"


def percent(share: float | None, places: int = 0) -> str:
    """A share as a percentage."""
    return DASH if share is None else f"{100 * share:.{places}f}{SPACE}%"


def score(share: float | None, count: int) -> str:
    """A share of `count` answers, with the places it takes to tell one answer more or less."""
    return percent(share, 0 if count <= 100 else 1)


def whole(value: float | None) -> str:
    """A count with its thousands set apart."""
    return DASH if value is None else f"{value:,.0f}"


def short(value: int) -> str:
    """A large count in thousands, millions or billions."""
    for unit, name in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if value >= unit:
            return f"{value / unit:.3g}{SPACE}{name}"
    return str(value)


def disk(size_bytes: int | None, largest: int | None = None) -> str:
    """The size of files in MB, from 10,000 MB on in GB; in a column, the unit of its largest."""
    if size_bytes is None:
        return DASH
    if (largest or size_bytes) >= 1e10:
        return f"{size_bytes / 1e9:,.1f}{SPACE}GB"
    return f"{size_bytes / 1e6:,.1f}{SPACE}MB"


def memory(size_bytes: int | None, largest: int | None = None) -> str:
    """Memory in GiB, below a tenth of one in MiB; in a column the unit of its largest."""
    if size_bytes is None:
        return DASH
    in_gib = size_bytes >= 2**30 / 10 if largest is None else largest >= 10 * 2**30
    if in_gib:
        return f"{size_bytes / 2**30:,.2f}{SPACE}GiB"
    return f"{size_bytes / 2**20:,.1f}{SPACE}MiB"


def duration(seconds: float) -> str:
    """A time in the unit one would say it in."""
    if seconds < 99.5:
        return f"{seconds:.0f}{SPACE}seconds"
    if seconds < 99.5 * 60:
        return f"{seconds / 60:.0f}{SPACE}minutes"
    return f"{seconds / 3600:.1f}{SPACE}hours"
