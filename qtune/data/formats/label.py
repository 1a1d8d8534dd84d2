"""Answers marked as good or bad (kto): a conversation in one of three forms, and its `label`."""

from dataclasses import replace
from typing import Any

from qtune.data.format import Format, Parts, Record
from qtune.data.formats import alpaca, messages, prompt_completion
from qtune.data.values import BadRow

_FORMS = (messages.FORMAT, prompt_completion.FORMAT, alpaca.FORMAT)
# Numbers and texts are what tables without a type for it have.
_LABELS = {"true": True, "1": True, "false": False, "0": False}


def _parts(record: Record) -> Parts:
    form = next(form for form in _FORMS if form.needs[0] <= record.keys())
    return replace(form.parts(record), label=_label(record["label"]))


def _label(value: Any) -> bool:
    label = _LABELS.get(str(value).strip().lower())
    if label is None:
        raise BadRow(
            f"'label' must say true or false, not {value!r}; where it is no mark of the answer, "
            "name the format of the rows without it, as in format: messages"
        )
    return label


FORMAT = Format(
    tuple(form.needs[0] | {"label"} for form in _FORMS),
    frozenset().union(*(form.takes for form in _FORMS)),
    _parts,
)
