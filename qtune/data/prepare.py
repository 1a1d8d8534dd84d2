"""The data of a run: rows read, rendered, masked and looked over, before anything else is done."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qtune.data.chat import Sample, encode_all
from qtune.data.lint import Finding, lint, overlap
from qtune.data.rows import Row
from qtune.data.sources import load, split_off
from qtune.errors import UserError
from qtune.recipe import Data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

MOST_SHOWN = 10


@dataclass(frozen=True)
class Dataset:
    """Encoded training and held-out samples, the test rows, and what looked wrong but not fatal."""

    train: list[Sample]
    held_out: list[Sample]
    test: list[Row]
    warnings: list[Finding]


def prepare(settings: Data, tokenizer: "Tokenizer", seed: int) -> Dataset:
    """The run's data; raises UserError with the rows that would spoil it."""
    rows = load(settings.train)
    if settings.validation is None:
        rows, held_out = split_off(rows, seed=seed)
    else:
        held_out = load(settings.validation)
    test = _questions(load(settings.test)) if settings.test is not None else []
    train_samples, held_out_samples, test_samples = (
        encode_all(
            tokenizer,
            part,
            train_on=settings.train_on,
            max_length=settings.max_length,
            truncate=settings.truncate,
        )
        for part in (rows, held_out, test)
    )
    findings = lint(train_samples, tokenizer) + lint(held_out_samples, tokenizer)
    findings += overlap(train_samples, held_out_samples + test_samples)
    _raise_if_fatal(findings)
    return Dataset(train_samples, held_out_samples, test, [f for f in findings if not f.fatal])


def _questions(rows: list[Row]) -> list[Row]:
    """The rows; raises UserError where one has an answer and nothing before it."""
    for row in rows:
        if len(row.messages) < 2:
            raise UserError(f"{row.place}: a test row needs a message before the expected answer")
    return rows


def _raise_if_fatal(findings: Sequence[Finding]) -> None:
    fatal = [str(finding) for finding in findings if finding.fatal]
    if fatal:
        more = [f"and {len(fatal) - MOST_SHOWN} more"] if len(fatal) > MOST_SHOWN else []
        raise UserError("\n".join(fatal[:MOST_SHOWN] + more))
