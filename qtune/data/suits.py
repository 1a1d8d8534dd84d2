"""Which rows an objective can learn from, asked before anything is loaded.

A row comes in one of four forms. Answers and texts are learned token by token (sft, pretrain);
pairs are for dpo, orpo and simpo; answers with a label for kto. Nothing is read as something else:
an answer that a label calls bad would be learned as a good one by sft.
"""

from collections.abc import Mapping
from typing import Literal

from qtune.data.rows import Row
from qtune.errors import UserError
from qtune.recipe_train import ObjectiveName

Form = Literal["answer", "text", "pair", "labelled answer"]

_WANTED: dict[ObjectiveName, tuple[Form, ...]] = {
    "sft": ("answer", "text"),
    "pretrain": ("answer", "text"),
    "dpo": ("pair",),
    "orpo": ("pair",),
    "simpo": ("pair",),
    "kto": ("labelled answer",),
}
_HOW: dict[Form, str] = {
    "answer": "a conversation without another answer beside it or a label",
    "text": "plain text",
    "pair": "two answers, 'chosen' and 'rejected'",
    "labelled answer": "an answer with a 'label', true or false",
}


def takes_pairs(objective: ObjectiveName) -> bool:
    """Whether the objective learns from pairs of answers."""
    return "pair" in _WANTED[objective]


def form_of(row: Row) -> Form:
    """The form of a row."""
    if row.rejected is not None:
        return "pair"
    if row.label is not None:
        return "labelled answer"
    return "text" if row.plain else "answer"


def check_single(places: Mapping[Form, str]) -> None:
    """Raises UserError where rows of one source have several forms; `places` has one of each."""
    if len(places) > 1:
        (first, there), (other, here) = list(places.items())[:2]
        raise UserError(
            f"{here}: this row is {_HOW[other]}, and {there} is {_HOW[first]}; a source has rows "
            "of one form: mend the row, divide the source, or name its format"
        )


def check_form(objective: ObjectiveName, form: Form, place: str) -> None:
    """Raises UserError where the objective cannot learn from the form of the row at this place."""
    wanted = _WANTED[objective]
    if form in wanted:
        return
    needed = " or ".join(_HOW[each] for each in wanted)
    others = " or ".join(name for name, forms in _WANTED.items() if form in forms)
    raise UserError(
        f"{place}: train.objective: {objective} needs {needed}, and this row is {_HOW[form]}; "
        f"change the data, or set train.objective: {others}"
    )
