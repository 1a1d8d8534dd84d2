"""The text that calibration runs through the model: training samples, a file, or half of each.

What a layer is given decides how its weights are best rounded, at two bits more than the method
does, so the text should be like that of the task: the training samples as they are rendered, unless
the recipe says otherwise. They are drawn at random, always the same ones, so that every source of a
mixture is among them. Rows hold whole samples as far as these are no longer than a row.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qtune.data.sample import Sample
from qtune.errors import UserError
from qtune.recipe import Calibration

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

TRAIN = "train"
# read from a file for each token that is wanted: more than any tokenizer puts into one
CHARACTERS_PER_TOKEN = 16


@dataclass(frozen=True)
class Text:
    """Rows of token ids that calibration runs on, and where they are from."""

    rows: list[list[int]]
    source: str

    @cached_property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return sum(map(len, self.rows))

    @cached_property
    def sha256(self) -> str:
        """Hash of the rows."""
        return hashlib.sha256(repr(self.rows).encode()).hexdigest()


def calibration_text(
    settings: Calibration, samples: Sequence[Sample], tokenizer: "Tokenizer"
) -> Text:
    """At most `settings.tokens` tokens of the text that the recipe names.

    Raises UserError for a file that cannot be read and where there is no text at all.
    """
    parts = [part.strip() for part in settings.text.split("+")]
    tokens = settings.tokens // len(parts)
    taken = [
        _of_samples(samples, tokens, settings.length)
        if part == TRAIN
        else _of_file(Path(part), tokens, settings.length, tokenizer)
        for part in parts
    ]
    rows = list(chain.from_iterable(taken))
    if not rows:
        raise UserError(f"quant.calibration.text: {settings.text} holds no text; name another")
    return Text(rows, settings.text)


def _of_samples(samples: Sequence[Sample], tokens: int, length: int) -> list[list[int]]:
    """Rows of whole samples; one that is longer than a row is cut."""
    order = np.random.default_rng(0).permutation(len(samples))
    texts = (list(samples[int(i)].ids[:length]) for i in order)
    rows: list[list[int]] = []
    for text in _first(texts, tokens):
        if rows and len(rows[-1]) + len(text) <= length:
            rows[-1].extend(text)
        else:
            rows.append(text)
    return rows


def _of_file(path: Path, tokens: int, length: int, tokenizer: "Tokenizer") -> list[list[int]]:
    """Full rows of the beginning of a text file; what is left at its end makes a shorter one."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(tokens * CHARACTERS_PER_TOKEN)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"quant.calibration.text: {path} cannot be read as text ({error}); name a text file, "
            "or train for the training samples"
        ) from error
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:tokens]
    return [ids[at : at + length] for at in range(0, len(ids), length)]


def _first(texts: Iterable[list[int]], tokens: int) -> Iterator[list[int]]:
    """The first texts with so many tokens together, the last one cut."""
    for text in texts:
        if tokens <= 0:
            return
        if text:
            yield text[:tokens]
        tokens -= len(text)
