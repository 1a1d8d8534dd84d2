"""Whether an answer is the expected one, by the metric of the recipe, and how sure a score is.

`exact_match` compares text without the white space around it; `contains` looks for the expected
text in the answer; `json_match` compares parsed values (strict_json), `json_fields` counts their
right fields (json_fields), `number_match` compares the last numbers (number_match).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from qtune.evaluate.intervals import interval
from qtune.evaluate.json_fields import share_of_fields
from qtune.evaluate.number_match import same_number
from qtune.evaluate.strict_json import parsed, same
from qtune.recipe_evaluate import MetricName as Metric

__all__ = ["Metric", "Score", "grade", "matches", "score"]


@dataclass(frozen=True)
class Score:
    """How right each answer is, 0 to 1, with the mean and its 95 % confidence interval."""

    values: list[float]

    @property
    def value(self) -> float:
        """The mean; where answers are right or wrong, the share of right ones."""
        return sum(self.values) / len(self.values)

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end of the mean's 95 % confidence interval."""
        return interval(self.values)


def score(answers: Sequence[str], references: Sequence[str], metric: Metric) -> Score:
    """The score of answers against the references of the same rows; ValueError without any."""
    if not answers:
        raise ValueError("there are no answers to score")
    pairs = zip(answers, references, strict=True)
    return Score([grade(answer, reference, metric) for answer, reference in pairs])


def grade(answer: str, reference: str, metric: Metric) -> float:
    """How right the answer is: 0 or 1, and what is between for `json_fields`."""
    match metric:
        case "exact_match":
            return float(answer.strip() == reference.strip())
        case "contains":
            return float(bool(reference.strip()) and reference.strip() in answer)
        case "number_match":
            return float(same_number(answer, reference))
        case "json_fields":
            return share_of_fields(answer, reference)
    return float(_same_json(answer, reference))


def matches(answer: str, reference: str, metric: Metric) -> bool:
    """Whether the answer is all right by the metric."""
    return grade(answer, reference, metric) == 1


def _same_json(answer: str, reference: str) -> bool:
    """Whether both are strict JSON of the same value."""
    try:
        return same(parsed(answer), parsed(reference))
    except (ValueError, RecursionError):
        return False
