"""The data of a run: tokenised, looked over and divided, before anything heavy is loaded.

Training and held-out rows are tokenised samples from the cache (`encoded.py`). Where the recipe
names no validation rows, a share of each training source is set aside (`divide.py`). Of a stream
only the first rows are looked at.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from qtune.data.divide import divided, good_answers
from qtune.data.encoded import Encoded, encoded, glimpsed
from qtune.data.feed import Feed, StoredFeed
from qtune.data.findings import Finding, Findings
from qtune.data.mix import Mix
from qtune.data.questions import questions
from qtune.data.repeats import overlap, repeated, row_hashes
from qtune.data.rows import Row
from qtune.data.sample import Sample
from qtune.data.store import Samples, joined
from qtune.data.stream import StreamFeed
from qtune.data.summary import summary
from qtune.errors import UserError
from qtune.recipe import Recipe
from qtune.recipe_data import sources

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

# share of the training rows that is held out where the recipe does not say
SHARE = 0.05
# rows of each stream that are looked at before training
GLIMPSED_ROWS = 1000


@dataclass(frozen=True)
class Dataset:
    """What a run trains on, is measured with and is asked, and what looked odd but is not fatal.

    `warnings` are the first findings of each kind; `summary` has the counts of all and the figures
    of the samples, for JSON.
    """

    feed: Feed
    held_out: Sequence[Sample]
    test: list[Row]
    warnings: list[Finding]
    summary: dict[str, Any]


def prepare(recipe: Recipe, tokenizer: "Tokenizer", *, builds: bool = True) -> Dataset:
    """The run's data; with `builds` false, once another process has tokenised it.

    Raises UserError with the rows that would spoil the run.
    """
    test = questions(recipe, tokenizer)
    training, validation = _parts(recipe, tokenizer, builds)
    train, held_out = (joined([p.samples for p in parts]) for parts in (training, validation))
    findings = Findings()
    findings.merge(*(part.findings for part in [*validation, *training]))
    findings.merge(repeated(train), *_overlaps(train, held_out, test))
    feed = _feed(training, recipe, tokenizer)
    figures = _summary(training, feed.shares, train, held_out, findings)
    return Dataset(feed, good_answers(held_out), test, findings.kept, figures)


def _parts(
    recipe: Recipe, tokenizer: "Tokenizer", builds: bool
) -> tuple[list[Encoded], list[Encoded]]:
    """The training sources and the held-out ones."""
    data = recipe.data
    training = [
        glimpsed(source, recipe, tokenizer, GLIMPSED_ROWS)
        if data.streaming
        else encoded(source, recipe, tokenizer, builds=builds)
        for source in data.train_sources
    ]
    if data.validation is None or isinstance(data.validation, float):
        return _divided(training, data.validation or SHARE, recipe.seed)
    return training, [
        encoded(source, recipe, tokenizer, builds=builds) for source in sources(data.validation)
    ]


def _divided(
    training: Sequence[Encoded], share: float, seed: int
) -> tuple[list[Encoded], list[Encoded]]:
    """The sources without a share of their rows, and that share; UserError: it has no row."""
    rest, aside = [], []
    for part in training:
        kept, held_out = divided(part.samples, share, seed)
        rest.append(replace(part, samples=kept))
        # what is odd about a source is told with the rest
        aside.append(replace(part, samples=held_out, findings=Findings()))
    if not any(len(part.samples) for part in aside):
        raise UserError(
            f"{training[0].source.path}: a single row, or answers that are all bad, cannot be "
            "divided into training and validation; add rows, or name data.validation"
        )
    return rest, aside


def _overlaps(train: Samples, held_out: Samples, test: Sequence[Row]) -> list[Findings]:
    """Held-out and test rows that training sees."""
    hashes = np.array([row_hashes(row) for row in test], dtype=np.uint64).reshape(-1, 2)
    return [
        overlap(train, held_out.whole, held_out.prompt, lambda i: held_out[i].place),
        overlap(train, hashes[:, 0], hashes[:, 1], lambda i: test[i].place),
    ]


def _feed(training: Sequence[Encoded], recipe: Recipe, tokenizer: "Tokenizer") -> Feed:
    parts = [part.samples for part in training]
    if recipe.data.streaming:
        return StreamFeed(recipe, tokenizer, joined(parts))
    mix = Mix(parts, [part.source.weight for part in training])
    return StoredFeed(mix, recipe.train.batch_size, recipe.seed)


def _summary(
    training: Sequence[Encoded],
    shares: Sequence[float],
    train: Samples,
    held_out: Samples,
    findings: Findings,
) -> dict[str, Any]:
    """The figures that `Dataset.summary` holds."""
    return {
        "train": {"rows": _num_rows(train), **summary(train)},
        "held_out": {"rows": _num_rows(held_out), **summary(held_out)},
        "sources": [
            {
                "path": part.source.path,
                "share": share,
                "rows": _num_rows(part.samples),
                "left_out": part.findings.counts["left out"],
                "tokens": int(part.samples.lengths.sum()),
            }
            for part, share in zip(training, shares, strict=True)
        ],
        "findings": dict(findings.counts),
    }


def _num_rows(samples: Samples) -> int:
    return int(np.count_nonzero(samples.whole))
