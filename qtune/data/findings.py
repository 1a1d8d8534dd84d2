"""What looks odd in the data: findings, each with its place, counted by kind.

A data set of millions of rows may have the same flaw in each of them, so all are counted and only
the first of every kind are kept.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Kind = Literal[
    "nothing learned",
    "end not learned",
    "several BOS",
    "no BOS",
    "empty turn",
    "cut",
    "left out",
    "repeated",
    "held out and trained on",
    "prompt trained on",
    "other prompt",
]
# findings of a kind whose places are told
MOST_KEPT = 5


@dataclass(frozen=True)
class Finding:
    """A problem of one row; a fatal one must stop the run."""

    place: str
    problem: str
    fatal: bool
    kind: Kind

    def __str__(self) -> str:
        return f"{self.place}: {self.problem}"


class Findings:
    """Findings counted by kind; `kept` are the first few of each."""

    def __init__(
        self, counts: Mapping[str, int] | None = None, kept: Iterable[Finding] = ()
    ) -> None:
        self.counts: Counter[str] = Counter(counts)
        self.kept = list(kept)

    def add(self, *findings: Finding) -> None:
        """Take in findings, each of which counts once."""
        for finding in findings:
            self._keep(finding)
            self.counts[finding.kind] += 1

    def merge(self, *others: "Findings") -> None:
        """Take in findings that were collected elsewhere."""
        for other in others:
            for finding in other.kept:
                self._keep(finding)
            self.counts += other.counts

    def of(self, kind: str) -> list[Finding]:
        """The findings of a kind that were kept."""
        return [finding for finding in self.kept if finding.kind == kind]

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return {"counts": dict(self.counts), "kept": [asdict(finding) for finding in self.kept]}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Findings":
        """The findings that `to_json` wrote."""
        return cls(value["counts"], [Finding(**finding) for finding in value["kept"]])

    def _keep(self, finding: Finding) -> None:
        if len(self.of(finding.kind)) < MOST_KEPT:
            self.kept.append(finding)
