"""Answers to a few test rows while a run trains: whether it learns what it should, in words."""

from collections.abc import Callable
from typing import Any

from torch import nn

from qtune.evaluate.generate import answer
from qtune.setup import Setup

NUM_ROWS = 4


def answers_to_test_rows(setup: Setup) -> Callable[[nn.Module], list[dict[str, Any]]] | None:
    """A function that asks a model the first test rows; None where there are none.

    It gives a dict per row: `prompt`, `answer`, `expected`, all text. Answers are greedy.
    """
    rows = setup.data.test[:NUM_ROWS]
    if not rows:
        return None
    settings = setup.recipe.evaluate

    def ask(model: nn.Module) -> list[dict[str, Any]]:
        made = answer(model, setup.tokenizer, rows, max_new_tokens=settings.max_new_tokens)
        return [
            {
                "prompt": row.messages[-2]["content"],
                "answer": text,
                "expected": row.messages[-1]["content"],
            }
            for row, text in zip(rows, made.texts, strict=True)
        ]

    return ask
