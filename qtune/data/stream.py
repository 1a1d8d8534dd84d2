"""Training samples read as they are needed, from sources that may be larger than the disk.

Rows come in the order of their source, which begins again at its end. Several sources take turns by
their weights, 1 where there is none, without chance: the next sample is of the source that is
furthest behind its share. So the order is the same in every process and run, and all there is to
keep for a resumed run is how far each source was read: readers then pass over what came before.

A row that cannot be used does not end a run that may have gone on for days. It is left out, and the
first ones are told.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from qtune.data.chat import encode
from qtune.data.identity import samples_key
from qtune.data.rows import Row
from qtune.data.sample import Sample
from qtune.data.sources import Position, read
from qtune.data.suits import check_form, form_of
from qtune.errors import UserError
from qtune.progress import say
from qtune.recipe import Recipe
from qtune.recipe_data import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

MOST_TOLD = 10

Encode = Callable[[Row], list[Sample]]


class StreamFeed:
    """The samples of a recipe's streams; `batch` must be called for one step after the other.

    `samples` are the first ones, which somebody has looked at before. Raises UserError where a
    source cannot be read, and in `batch` where it has not a single row that can be used.
    """

    num_rows = None

    def __init__(
        self, recipe: Recipe, tokenizer: "Tokenizer", samples: Sequence[Sample] = ()
    ) -> None:
        sources = recipe.data.train_sources
        keys = [samples_key(source, tokenizer, recipe.data) for source in sources]
        weights = [1.0 if source.weight is None else source.weight for source in sources]
        self.sha256 = hashlib.sha256(repr((keys, weights)).encode()).hexdigest()
        self.samples = samples
        self.left_out = LeftOut()
        self._batch_size = recipe.train.batch_size
        self.shares = [weight / sum(weights) for weight in weights]
        encode_row = usable(recipe, tokenizer)
        self._streams = [_Stream(source, encode_row, self.left_out) for source in sources]
        self._step = 0

    def batch(self, step: int) -> list[Sample]:
        """The samples of step `step`, which must be the one behind the last."""
        if step != self._step:
            raise ValueError(f"a stream is at step {self._step} and cannot give step {step}")
        self._step += 1
        return [self._next().next() for _ in range(self._batch_size)]

    def state(self) -> dict[str, Any]:
        """The next step, and how far each source was read."""
        return {"step": self._step, "sources": [asdict(stream.at) for stream in self._streams]}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on behind the batch after which `state` was taken."""
        self._step = state["step"]
        for stream, at in zip(self._streams, state["sources"], strict=True):
            stream.go_to(Reached(**{**at, "position": Position(**at["position"])}))

    def _next(self) -> "_Stream":
        """The source that is furthest behind its share, the first of several."""
        given = sum(stream.at.given for stream in self._streams) + 1
        behind = [
            share * given - stream.at.given
            for share, stream in zip(self.shares, self._streams, strict=True)
        ]
        return self._streams[behind.index(max(behind))]


class LeftOut:
    """Rows that were left out: how many, and the first of them on the terminal."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, place: str, text: str) -> None:
        """Note a row that cannot be used, and why."""
        self.count += 1
        if self.count <= MOST_TOLD:
            say(f"left out: {place}: {text}")
        if self.count == MOST_TOLD:
            say("further rows are left out without a word")


@dataclass(frozen=True)
class Reached:
    """How far a source was read: its rows behind `position` come next, less what was given.

    `split` samples of the first of these rows are behind, too; `given` counts all samples of all
    passes through the source.
    """

    position: Position = field(default_factory=Position)
    split: int = 0
    given: int = 0


class _Stream:
    """The samples of one source, pass after pass."""

    def __init__(self, source: Source, encode_row: Encode, left_out: LeftOut) -> None:
        self._source, self._encode, self._left_out = source, encode_row, left_out
        self.go_to(Reached())

    def go_to(self, at: Reached) -> None:
        """Go on from there; nothing is read before the next sample is asked for."""
        self.at = at
        self._samples = self._read()

    def next(self) -> Sample:
        """The next sample."""
        return next(self._samples)

    def _read(self) -> Iterator[Sample]:
        while True:
            whole, before = self.at.position == Position(), self.at.given
            yield from self._pass()
            if whole and self.at.given == before:
                raise UserError(f"{self._source.path}: not a single row can be used for training")
            self.at = Reached(given=self.at.given)

    def _pass(self) -> Iterator[Sample]:
        """What is left of a pass through the source."""
        rows = read(
            self._source, streaming=True, mistakes=self._left_out, position=self.at.position
        )
        for row in rows:
            for sample in self._encoded(row)[self.at.split :]:
                self.at = Reached(self.at.position, self.at.split + 1, self.at.given + 1)
                yield sample
            self.at = Reached(rows.position, given=self.at.given)

    def _encoded(self, row: Row) -> list[Sample]:
        try:
            return self._encode(row)
        except UserError as error:
            self._left_out.add(row.place, str(error).removeprefix(f"{row.place}: "))
            return []


def usable(recipe: Recipe, tokenizer: "Tokenizer") -> Encode:
    """A function from rows to samples; it raises UserError for a row that nothing is learned from.

    What is asked of stored rows before training is asked here of each row as it comes.
    """

    def encoded(row: Row) -> list[Sample]:
        check_form(recipe.train.objective, form_of(row), row.place)
        samples = encode(tokenizer, row, settings=recipe.data)
        for sample in samples:
            if not all(part.num_targets for part in sample.parts):
                raise UserError(f"{row.place}: no token of an answer is learned")
        return samples

    return encoded
