"""What a model scores in a task of the lm-eval harness, as a row of the table keeps it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qtune.evaluate.paired_scores import p_value


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """A model's score in a task, or in a group of tasks, by one of its metrics.

    `standard_error` and the 95 % `interval` are those of a mean over `num` rows, `p_value` is of
    the difference from the trained model's score; all are None where the score is no such mean.
    """

    task: str
    metric: str
    value: float
    standard_error: float | None = None
    interval: tuple[float, float] | None = None
    num: int
    p_value: float | None = None


@dataclass(frozen=True)
class Graded:
    """A score with how each row did, `values`; none where the score is no mean of them."""

    score: TaskScore
    values: tuple[float, ...] = ()


def against(found: Sequence[Graded], trained: Sequence[Graded]) -> tuple[TaskScore, ...]:
    """The scores with the p-values of their differences from the trained model's."""
    truth = {(other.score.task, other.score.metric): other.values for other in trained}
    return tuple(
        replace(one.score, p_value=_p_value(one.values, truth.get(_key(one.score), ())))
        for one in found
    )


def _key(score: TaskScore) -> tuple[str, str]:
    return score.task, score.metric


def _p_value(values: tuple[float, ...], trained: tuple[float, ...]) -> float | None:
    """None where there is nothing to compare row by row."""
    return p_value(values, trained) if values and len(values) == len(trained) else None
