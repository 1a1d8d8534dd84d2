"""The recipe's `data` section: where rows come from and how they are read."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from qtune.errors import UserError, check_at_least

RowFormat = Literal[
    "auto",
    "messages",
    "sharegpt",
    "alpaca",
    "prompt_completion",
    "text",
    "preference",
    "label",
]
Plain = str | int | float | bool


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source of rows."""

    path: str
    """Hub id (`org/name:split`), file, `data/*.jsonl`, folder, `folder:split`, or `demo:train`."""
    format: RowFormat = "auto"
    """Form of the rows; auto tells it from the names of the columns."""
    columns: dict[str, str] = field(default_factory=dict)
    """Names of this source's columns by what the format calls them: `instruction: question`."""
    where: dict[str, Plain | tuple[Plain, ...]] = field(default_factory=dict)
    """Rows that are taken: column -> value, list of values, or comparison such as '>= 3'."""
    rows: int | None = None
    """Takes the first rows only, after `where`."""
    weight: float | None = None
    """Its share of an epoch, relative to others; none: its row count, or 1 when streaming."""
    revision: str | None = None
    """Hub branch, tag or commit."""

    def __post_init__(self) -> None:
        check_at_least(self, "source", 1, "rows")
        if self.weight is not None and self.weight <= 0:
            raise UserError(f"source.weight ({self.weight}) must be positive; or leave it out")


Sources = str | Source | tuple[str | Source, ...]


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the rows come from and how they are read."""

    train: Sources
    """Training rows: a file, a hub data set, `demo:train`, a source with options, or a list."""
    validation: float | Sources | None = None
    """Rows for the held-out loss: sources, or a share of the training rows; none: 0.05 of them."""
    test: Sources | None = None
    """Rows for the exact-match score; the last message of each is the expected answer."""
    template: str | None = None
    """Chat template: a Jinja file, or `chatml`; none: the model's own."""
    max_length: int = 1024
    """Longest sample in tokens."""
    overlong: Literal["error", "truncate", "drop", "split"] = "error"
    """What becomes of longer ones: an error, cut, left out, or (text only) several samples."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Which tokens are supervised: every assistant turn, the last one, or all text."""
    packing: bool = True
    """Several samples in one row where the model allows it; false: one per row, padded."""
    streaming: bool = False
    """Read training rows as they are needed, in their order; for sets larger than the disk."""

    def __post_init__(self) -> None:
        check_at_least(self, "data", 8, "max_length")
        for key in ("train", "validation", "test"):
            if getattr(self, key) == ():
                raise UserError(f"data.{key} names no source")
        share = self.validation
        if isinstance(share, float) and not 0 < share < 1:
            raise UserError(
                f"data.validation ({share}) must be a share between 0 and 1, or a source"
            )
        if self.streaming and (share is None or isinstance(share, float)):
            raise UserError(
                "data.streaming needs data.validation to name rows of its own: of a stream no "
                "share can be set aside"
            )

    @property
    def train_sources(self) -> tuple[Source, ...]:
        """The training sources, with their options."""
        return sources(self.train)


def sources(given: Sources) -> tuple[Source, ...]:
    """What a recipe gives as sources, each as a Source."""
    several: Sequence[str | Source] = given if isinstance(given, tuple) else (given,)
    return tuple(Source(path=each) if isinstance(each, str) else each for each in several)
