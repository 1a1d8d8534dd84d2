"""The evaluate section's own checks."""

from pathlib import Path
from typing import Any

import pytest

from qtune.errors import UserError
from qtune.recipe_evaluate import Evaluate


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loss_rows": 0}, "evaluate.loss_rows (0) must be at least 1"),
        ({"answer_rows": -1}, "evaluate.answer_rows (-1) must be at least 0"),
        ({"batch_size": 0}, "evaluate.batch_size (0) must be at least 1"),
        ({"task_limit": 0}, "evaluate.task_limit (0) must be at least 1"),
        ({"task_shots": -1}, "evaluate.task_shots (-1) must be at least 0"),
        ({"perplexity_context": 1}, "evaluate.perplexity_context (1) must be at least 2"),
        ({"perplexity_stride": 0}, "evaluate.perplexity_stride (0) must be at least 1"),
        ({"perplexity_context": 64, "perplexity_stride": 65}, "must be at most"),
        ({"task_path": Path("x.yaml")}, "evaluate.task_path needs evaluate.tasks"),
    ],
)
def test_senseless_values(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        Evaluate(**given)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "given",
    [
        {"answer_rows": 0, "loss_rows": 1, "task_shots": 0, "task_limit": 1},
        {"perplexity_context": 2, "perplexity_stride": 2},
        {"task_path": Path("x.yaml"), "tasks": ("x",)},
    ],
)
def test_values_at_the_limits(given: dict[str, Any]) -> None:
    made = Evaluate(**given)
    assert {name: getattr(made, name) for name in given} == given
