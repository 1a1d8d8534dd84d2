"""What the terminal shows of the data: lengths, what is learned, what looks odd, a few samples."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

from rich.bar import Bar
from rich.style import Style
from rich.table import Table
from rich.text import Text

from qtune.data.findings import Findings
from qtune.data.sample import Sample
from qtune.data.tokens import special_tokens
from qtune.progress import console, say
from qtune.setup import Setup

NUM_SAMPLES = 3
MOST_PLACES = 3
BAR_WIDTH = 40
LEARNED, GIVEN, SPECIAL = Style(color="green"), Style(dim=True), Style(bold=True)


def data(setup: Setup) -> None:
    """Print the lengths of the samples, the share that is learned, and a few samples."""
    found = setup.data.summary["train"]
    console.print(
        f"\n{found['samples']} samples, {found['tokens']} tokens, "
        f"{found['supervised_share']:.1%} of them learned; lengths: median "
        f"{found['length_p50']:.0f}, 90 % {found['length_p90']:.0f}, 99 % "
        f"{found['length_p99']:.0f}, longest {found['length_max']}"
    )
    console.print(_histogram(found["histogram"]))
    samples(setup)


def samples(setup: Setup) -> None:
    """Print training samples from here and there; what is learned is between ‹ and ›, and green.

    Special tokens are bold; a weight other than 1 stands behind what it is of.
    """
    special = set(special_tokens(setup.tokenizer))
    every = setup.data.feed.samples
    num = min(NUM_SAMPLES, len(every))
    for sample in [every[i * len(every) // num] for i in range(num)]:
        for part, title in zip(sample.parts, _titles(sample), strict=True):
            console.rule(Text(title))
            console.print(_marked(part, special, setup), soft_wrap=True)


def notes(setup: Setup) -> None:
    """Print what looks odd: for each kind of finding how many there are, and the first few."""
    counts = setup.data.summary["findings"]
    found = Findings(counts, setup.data.warnings)
    for kind, count in counts.items():
        told = [str(finding) for finding in found.of(kind)[:MOST_PLACES]]
        more = [f"and {count - len(told)} more"] if count > len(told) else []
        say(f"note: {_share(kind, setup.data.summary)}: {'; '.join(told + more)}")


def _share(kind: str, summary: dict[str, Any]) -> str:
    """How many rows have a finding, and what share that is of rows that were too long."""
    count: int = summary["findings"][kind]
    if kind not in ("cut", "left out"):
        return f"{count} row" + "s" * (count > 1)
    kept = summary["train"]["rows"] + summary["held_out"]["rows"]
    rows = kept + summary["findings"].get("left out", 0)
    return f"{count} of {rows} rows ({count / rows:.0%})"


def _histogram(found: dict[str, Any]) -> Table:
    """How many samples have which length, as bars."""
    width, counts = found["width"], found["counts"]
    grid = Table.grid(padding=(0, 1))
    grid.add_column(justify="right")
    for i, count in enumerate(counts):
        label = f"{i * width}-{(i + 1) * width - 1}"
        grid.add_row(label, Bar(max(counts), 0, count, width=BAR_WIDTH), str(count))
    return grid


def _titles(sample: Sample) -> Sequence[str]:
    """What stands above each part of a sample."""
    if sample.rejected is not None:
        return f"{sample.place}, chosen", f"{sample.place}, rejected"
    if sample.label is None:
        return (sample.place,)
    return (f"{sample.place}, {'good' if sample.label else 'bad'} answer",)


def _marked(part: Sample, special: set[int], setup: Setup) -> Text:
    """The text of a part with what is learned marked."""
    text = Text()
    for weight, stretch in groupby(_pieces(part, special, setup), key=itemgetter(0)):
        style = LEARNED if weight else GIVEN
        if weight:
            text.append("‹", style)
        for _, is_special, words in stretch:
            text.append(words, style + SPECIAL if is_special else style)
        if weight:
            text.append("›" if weight == 1 else f"› (weight {weight:g})", style)
    return text


def _pieces(part: Sample, special: set[int], setup: Setup) -> Iterator[tuple[float, bool, str]]:
    """Weight, whether special, and text of each stretch of tokens that are alike in both.

    A stretch's text is what it adds to the text before it: decoded alone, it would lose the blank
    that some tokenizers drop at the beginning.
    """
    told, end = "", 0
    kinds = zip(part.weights, (token in special for token in part.ids), strict=True)
    for (weight, is_special), stretch in groupby(kinds):
        end += sum(1 for _ in stretch)
        text = str(setup.tokenizer.decode(list(part.ids[:end])))
        yield weight, is_special, text[len(told) :]
        told = text
