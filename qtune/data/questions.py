"""Test rows: requests that a model answers, each with the answer that is expected."""

from typing import TYPE_CHECKING

from qtune.data.chat import prompt_ids
from qtune.data.rows import Problems, Row
from qtune.data.sources import load
from qtune.errors import UserError
from qtune.recipe import Recipe
from qtune.recipe_data import sources

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


def questions(recipe: Recipe, tokenizer: "Tokenizer") -> list[Row]:
    """The recipe's test rows, none where it names none.

    Raises UserError with up to ten rows that have nothing to answer or no text as the answer, or
    that the chat template refuses.
    """
    if recipe.data.test is None:
        return []
    rows = [row for source in sources(recipe.data.test) for row in load(source)]
    problems = Problems()
    for number, row in enumerate(rows):
        problem = _problem(row)
        # rendering takes time, and the others are not asked
        if problem is None and number < recipe.evaluate.answer_rows:
            problem = _refusal(row, tokenizer)
        if problem is not None:
            problems.add(row.place, problem)
    problems.raise_if_any()
    return rows


def _problem(row: Row) -> str | None:
    if len(row.messages) < 2:
        return "a test row needs a message before the expected answer"
    if not row.messages[-1].get("content"):
        return "a test row needs text as the expected answer; answers that call tools have none"
    return None


def _refusal(row: Row, tokenizer: "Tokenizer") -> str | None:
    """What the tokenizer or its template has against the row's prompt."""
    try:
        prompt_ids(tokenizer, row.messages[:-1], tools=row.tools, plain=row.plain)
    except UserError as error:
        return str(error)
    return None
