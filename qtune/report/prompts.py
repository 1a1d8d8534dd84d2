"""The answers of all models to each prompt of a suite, side by side; equal ones stand once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qtune.report.samples import clipped


@dataclass(frozen=True)
class Reply:
    """A text and the names of all models that wrote it."""

    names: list[str]
    text: str


@dataclass(frozen=True)
class Asked:
    """A prompt as the page shows it; `reference` is None where none is known."""

    prompt: str
    reference: str | None
    replies: list[Reply]


def beside(entry: dict[str, Any], order: Sequence[str]) -> Asked:
    """An entry of prompts.json, models in the order of the table's rows, others behind."""
    answers = entry["answers"]
    names = [name for name in order if name in answers]
    names += [name for name in answers if name not in names]
    texts: dict[str, list[str]] = {}
    for name in names:
        texts.setdefault(answers[name], []).append(name)
    replies = [Reply(written, clipped(text)) for text, written in texts.items()]
    reference = entry["reference"]
    return Asked(clipped(entry["prompt"]), reference and clipped(reference), replies)
