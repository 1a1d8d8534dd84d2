"""What a run has to do in a step, found by going through its steps without training.

The micro-batches are the very ones that the run will meet. Of a stream nobody knows them, so it is
taken to bring the worst there can be: micro-batches that are full, of samples that are as long as
they may be and learned from end to end.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qtune.data.feed import Feed, StoredFeed
from qtune.data.order import micro_batches, padded_length, share
from qtune.data.sample import Sample
from qtune.data.suits import takes_pairs
from qtune.recipe import Recipe

# so many steps and samples are looked at
MOST_STEPS = 1000
MOST_SAMPLES = 20_000


@dataclass(frozen=True)
class Workload:
    """The samples of some steps, all processes together, and how one goes through its share."""

    recipe: Recipe
    steps: list[list[Sample]]
    """Empty for a stream."""
    longest: Sample
    tokens_per_step: int
    num_processes: int
    packing: bool

    def largest(self, max_tokens: int) -> list[Sample]:
        """The largest micro-batch of at most `max_tokens`, or the longest sample alone."""
        if not self.steps:
            return self._full(max_tokens)
        groups = [
            group
            for samples in self.steps
            for group in micro_batches(
                share(samples, 0, self.num_processes), max_tokens, packing=self.packing
            )
        ]
        return max([[self.longest], *groups], key=self._size)

    def _full(self, max_tokens: int) -> list[Sample]:
        """The fewest equal samples that fill a micro-batch, if a process has so many in a step."""
        most = -(-self.recipe.train.batch_size // self.num_processes)
        count = min(most, -(-max_tokens // self.longest.num_tokens))
        length = max_tokens // count // len(self.longest.parts)
        return [_sample(self.recipe, min(length, len(self.longest.ids)))] * count

    def _size(self, samples: Sequence[Sample]) -> int:
        """Tokens that the model sees, padding included."""
        if self.packing:
            return sum(sample.num_tokens for sample in samples)
        parts = [part for sample in samples for part in sample.parts]
        return len(parts) * padded_length(max(len(part.ids) for part in parts))


def workload(
    recipe: Recipe, feed: Feed, num_steps: int, num_processes: int, *, packing: bool
) -> Workload:
    """What the run's steps are made of; a feed that has to be read in order stays where it is."""
    batch_size = recipe.train.batch_size
    if isinstance(feed, StoredFeed):
        count = max(1, min(num_steps, MOST_STEPS, MOST_SAMPLES // batch_size))
        steps = [feed.batch(step) for step in range(count)]
        longest = feed.samples[int(feed.samples.lengths.argmax())]
        tokens = _tokens(sample for step in steps for sample in step) // count
    else:
        steps, longest = [], _sample(recipe, recipe.data.max_length)
        tokens = _tokens(feed.samples) * batch_size // max(1, len(feed.samples))
    return Workload(recipe, steps, longest, tokens, num_processes, packing)


def _sample(recipe: Recipe, length: int) -> Sample:
    """A row of the kind the objective takes, of that many tokens in each part, all learned."""
    ids, weights = [0] * length, [0.0] + [1.0] * (length - 1)
    rejected = Sample("", ids, weights) if takes_pairs(recipe.train.objective) else None
    return Sample("", ids, weights, rejected=rejected, label=True)


def _tokens(samples: Iterable[Sample]) -> int:
    return sum(sample.num_tokens for sample in samples)
