"""The rows of a run's table: every form of the model, what was measured of it, and what it kept.

A row holds plain figures, so that the report and later tools need none of the code that measured
them. What is relative to the trained model in one figure, such as the KL divergence, stands in the
row itself; recovery depends on three rows and is computed anew whenever a row is put in.
"""

from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from qtune.evaluate.exact_match import Score
from qtune.evaluate.generate import Answers
from qtune.evaluate.long_context import CacheEffect
from qtune.evaluate.paired import Difference
from qtune.evaluate.perplexity import Likelihood
from qtune.evaluate.task_score import TaskScore
from qtune.evaluate.text_perplexity import TextLikelihood

Kind = Literal["base", "quantized", "adapter", "merged", "export"]
ORDER = get_args(Kind)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One form of the model and what was measured of it.

    `tokens` are the supervised held-out tokens, `kl` is KL(trained || row) per token, `top1` the
    agreement with the trained model's likeliest token, `nats` the loss less the trained model's
    with its standard error over samples. `exact_match` is the mean score by `metric` of `answers`,
    with its 95 % `interval` and the p-value of the difference from the trained model's answers;
    `fields` are shares of right answers by field of JSON. `consumer` is the library that loaded the
    model, `exact` whether it is the trained model bit for bit, `recovery` the share of the tuning's
    gain in loss that is kept.
    """

    name: str
    kind: Kind
    loss: float
    perplexity: float
    tokens: int
    kl: float | None = None
    top1: float | None = None
    nats: float | None = None
    standard_error: float | None = None
    recovery: float | None = None
    exact_match: float | None = None
    metric: str | None = None
    interval: tuple[float, float] | None = None
    p_value: float | None = None
    fields: dict[str, float] = field(default_factory=dict)
    answers: int = 0
    tasks: tuple[TaskScore, ...] = ()
    text: TextLikelihood | None = None
    size_bytes: int
    tokens_per_s: float | None = None
    consumer: str | None = None
    exact: bool | None = None


@dataclass(frozen=True)
class Merge:
    """Which weights the adapter was folded into, and why those."""

    chosen: Literal["original", "dequantized"]
    why: str


@dataclass
class Table:
    """The rows of a run; `trained` is the name of the one that the others are compared with."""

    trained: str
    rows: list[Row] = field(default_factory=list)
    merge: Merge | None = None
    kv_cache: CacheEffect | None = None

    def row(self, name: str) -> Row | None:
        """The row of that name, where there is one."""
        return next((row for row in self.rows if row.name == name), None)

    def put(self, row: Row, instead: str | None = None) -> Row:
        """Put a row in the place of the one of its name, or of `instead`; else behind its kind.

        Returns the row as it stands there, with its recovery; that of the others is made new too.
        """
        rows = {known.name: known for known in self.rows}
        rows.pop(instead or "", None)
        rows[row.name] = row
        self.rows = sorted(rows.values(), key=lambda row: ORDER.index(row.kind))
        self.rows = self.with_recovery().rows
        return next(known for known in self.rows if known.name == row.name)

    def with_recovery(self) -> "Table":
        """The table with the recovery of every row as its rows now give it."""
        rows = [replace(row, recovery=self._recovery(row)) for row in self.rows]
        return replace(self, rows=rows)

    def gain(self) -> float | None:
        """Nats per token that the tuning took off the loss of the base it was trained on.

        That base is the quantized one, in a run without a format the 16-bit one. None where there
        is no row of it or of the trained model, or no gain.
        """
        bases = {row.kind: row for row in reversed(self.rows)}
        base, trained = bases.get("quantized") or bases.get("base"), self.row(self.trained)
        if base is None or trained is None or base.tokens != trained.tokens:
            return None
        gain = base.loss - trained.loss
        return gain if gain > 0 else None

    def _recovery(self, row: Row) -> float | None:
        """The share of the gain that a row keeps; None for one measured on other tokens."""
        gain, trained = self.gain(), self.row(self.trained)
        if gain is None or trained is None or row.tokens != trained.tokens:
            return None
        return 1 - (row.loss - trained.loss) / gain


def make_row(
    name: str,
    kind: Kind,
    likelihood: Likelihood,
    *,
    size_bytes: int,
    change: Difference | None = None,
    score: Score | None = None,
    metric: str | None = None,
    p_value: float | None = None,
    fields: dict[str, float] | None = None,
    answers: Answers | None = None,
    tasks: tuple[TaskScore, ...] = (),
    text: TextLikelihood | None = None,
    consumer: str | None = None,
    exact: bool | None = None,
) -> Row:
    """The row of a model from what the other modules measured."""
    return Row(
        name=name,
        kind=kind,
        loss=likelihood.loss,
        perplexity=likelihood.perplexity,
        tokens=likelihood.tokens,
        kl=likelihood.kl,
        top1=likelihood.top1,
        nats=None if change is None else change.nats,
        standard_error=None if change is None else change.standard_error,
        exact_match=None if score is None else score.value,
        metric=metric,
        interval=None if score is None else score.interval,
        p_value=p_value,
        fields=fields or {},
        answers=0 if score is None else len(score.values),
        tasks=tasks,
        text=text,
        size_bytes=size_bytes,
        tokens_per_s=None if answers is None else answers.tokens_per_s,
        consumer=consumer,
        exact=exact,
    )
