"""Numbers as the page shows them, and the interval of a score.

Memory is counted in GiB as the plan and the bar do, files in MB as disks are sold. A value that was not measured is
a dash. Spaces between a number and its unit are narrow and do not break.
"""

from math import sqrt

DASH = "–"
SPACE = "\N{NARROW NO-BREAK SPACE}"
# two-sided 95 % quantile of the normal distribution
_Z = 1.959964


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % score interval (Wilson) of a share observed in `count` trials; (0, 1) without trials."""
    if count == 0:
        return 0.0, 1.0
    spread = _Z**2 / count
    middle = (share + spread / 2) / (1 + spread)
    half = _Z / (1 + spread) * sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def decimal(value: float | None, places: int = 4) -> str:
    """A number with fixed places; one that would be shown as zero and is not is shown as below the last."""
    if value is None:
        return DASH
    smallest = 10**-places
    if 0 < value < smallest / 2:
        return f"<{SPACE}{smallest:.{places}f}"
    return f"{value:,.{places}f}"


def significant(value: float | None) -> str:
    """A number with about three significant digits and no exponent, for speeds and perplexities."""
    if value is None:
        return DASH
    places = 3 if value < 10 else 2 if value < 100 else 1 if value < 1000 else 0
    return f"{value:,.{places}f}"


def percent(share: float | None, places: int = 0) -> str:
    """A share as a percentage."""
    return DASH if share is None else f"{100 * share:.{places}f}{SPACE}%"


def whole(value: float | None) -> str:
    """A count with its thousands set apart."""
    return DASH if value is None else f"{value:,.0f}"


def short(value: int) -> str:
    """A large count in thousands, millions or billions."""
    for unit, name in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if value >= unit:
            return f"{value / unit:.3g}{SPACE}{name}"
    return str(value)


def disk(size_bytes: int | None) -> str:
    """The size of files in MB, from 10,000 MB on in GB."""
    if size_bytes is None:
        return DASH
    if size_bytes >= 1e10:
        return f"{size_bytes / 1e9:,.1f}{SPACE}GB"
    return f"{size_bytes / 1e6:,.1f}{SPACE}MB"


def memory(size_bytes: int | None) -> str:
    """Memory in GiB, below a tenth of one in MiB."""
    if size_bytes is None:
        return DASH
    if size_bytes >= 2**30 / 10:
        return f"{size_bytes / 2**30:,.2f}{SPACE}GiB"
    return f"{size_bytes / 2**20:,.1f}{SPACE}MiB"


def duration(seconds: float) -> str:
    """A time in the unit one would say it in."""
    if seconds < 99.5:
        return f"{seconds:.0f}{SPACE}seconds"
    if seconds < 99.5 * 60:
        return f"{seconds / 60:.0f}{SPACE}minutes"
    return f"{seconds / 3600:.1f}{SPACE}hours"
