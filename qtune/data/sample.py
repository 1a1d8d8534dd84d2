"""A tokenised row: what the model reads, and how much each token counts in the loss."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Union


@dataclass(frozen=True)
class Sample:
    """Token ids with a weight each: 0 is not learned, 1 is, other weights scale the token's loss.

    `place` is where the row was read, `num_cut` the tokens left out of it because it was too long.
    A preference row is its chosen answer, with the other one as `rejected`; `label` says whether an
    answer is good (kto). The first weight is 0: nothing predicts the first token.
    """

    place: str
    ids: Sequence[int]
    weights: Sequence[float]
    num_cut: int = 0
    rejected: Union["Sample", None] = None
    label: bool | None = None

    @property
    def parts(self) -> tuple["Sample", ...]:
        """What stands for the row in a batch: the sample, and behind it the rejected one."""
        return (self,) if self.rejected is None else (self, self.rejected)

    @cached_property
    def num_tokens(self) -> int:
        """Tokens that the row puts into a batch."""
        return sum(len(part.ids) for part in self.parts)

    @cached_property
    def num_targets(self) -> int:
        """Tokens that are learned, of all parts."""
        return sum(sum(weight > 0 for weight in part.weights) for part in self.parts)

    @property
    def supervised(self) -> list[bool]:
        """Per token of this part, whether it is learned."""
        return [weight > 0 for weight in self.weights]

    def chosen(self) -> "Sample":
        """The sample without its rejected part, as perplexity is measured on it."""
        return self if self.rejected is None else replace(self, rejected=None)
