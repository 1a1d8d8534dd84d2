"""Whether an answer is the expected one, and how sure a share of right answers is.

`exact_match` compares text without the white space around it. `json_match` compares parsed values,
so that order of keys and spacing do not count, and everything else does: types (1 is neither "1"
nor true; 1.0 is no integer), duplicate keys, text around the value. The interval is Wilson's score
interval, which stays within [0, 1] and is right near the ends, where tuned models score.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

Metric = Literal["exact_match", "json_match"]

# two-sided 95 % of the normal distribution
Z = 1.959963984540054


@dataclass(frozen=True)
class Score:
    """Right answers out of all, with the 95 % confidence interval of the share."""

    correct: list[bool]

    @property
    def value(self) -> float:
        """Share of right answers."""
        return sum(self.correct) / len(self.correct)

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end of the share's 95 % confidence interval."""
        return wilson_interval(sum(self.correct), len(self.correct))


def score(answers: Sequence[str], references: Sequence[str], metric: Metric) -> Score:
    """The score of answers against the references of the same rows; ValueError without any."""
    if not answers:
        raise ValueError("there are no answers to score")
    pairs = zip(answers, references, strict=True)
    return Score([matches(answer, reference, metric) for answer, reference in pairs])


def matches(answer: str, reference: str, metric: Metric) -> bool:
    """Whether the answer is the reference; for `json_match` one that is no strict JSON is not."""
    if metric == "exact_match":
        return answer.strip() == reference.strip()
    try:
        return _same(_parsed(answer), _parsed(reference))
    except (ValueError, RecursionError):
        return False


def wilson_interval(num_correct: int, num: int) -> tuple[float, float]:
    """Ends of the 95 % score interval (Wilson 1927) of a share of `num_correct` in `num` > 0."""
    share, spread = num_correct / num, Z * Z / num
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def _parsed(text: str) -> Any:
    """The JSON value that is the whole text. ValueError: it is none, or an object repeats a key."""
    return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key comes twice")
    return made


def _refuse(constant: str) -> NoReturn:
    # Python reads NaN and Infinity, which JSON does not have
    raise ValueError(f"{constant} is not JSON")


def _same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)
