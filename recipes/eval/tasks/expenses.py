"""Rows and grades of the tasks in this folder: the demo's own messages, so no network is needed."""

from typing import Any

from datasets import Dataset

from qtune.data import demo
from qtune.evaluate.exact_match import grade

NUM_ROWS = 400


def rows(**_: Any) -> dict[str, Dataset]:
    """The split `test`: a message, and the expense in it as JSON."""
    found = [[part["content"] for part in row["messages"]] for row in demo.rows("test", NUM_ROWS)]
    parts = [{"message": message, "answer": answer} for *_, message, answer in found]
    return {"test": Dataset.from_list(parts)}


def pairs(**_: Any) -> dict[str, Dataset]:
    """The same rows, each with the answer to the next message as `other`."""
    parts = rows()["test"]
    others = [*parts["answer"][1:], parts["answer"][0]]
    return {"test": parts.add_column("other", others)}


def scores(doc: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """Whether an answer is the expected JSON, and the share of its fields that are right."""
    (answer,) = answers
    return {name: grade(answer, doc["answer"], name) for name in ("json_match", "json_fields")}
