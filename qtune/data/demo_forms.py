"""The demo's conversations in the other forms that rows can have: pairs, judged answers, text.

So that recipes for every objective run without a download. The worse answer of a pair is the right
one with a mistake that a model might make in one of its fields.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

Conversation = dict[str, Any]


def _preference(row: Conversation, number: int) -> dict[str, Any]:
    *prompt, answer = row["messages"]
    worse = {**answer, "content": mistaken(answer["content"], number)}
    return {"prompt": prompt, "chosen": [answer], "rejected": [worse]}


def _label(row: Conversation, number: int) -> dict[str, Any]:
    *prompt, answer = row["messages"]
    good = number % 2 == 0
    content = answer["content"] if good else mistaken(answer["content"], number // 2)
    return {"prompt": prompt, "completion": [{**answer, "content": content}], "label": good}


def _text(row: Conversation, number: int) -> dict[str, Any]:
    return {"text": "\n".join(message["content"] for message in row["messages"][1:])}


FORMS: dict[str, Callable[[Conversation, int], dict[str, Any]]] = {
    "messages": lambda row, number: row,
    "preference": _preference,
    "label": _label,
    "text": _text,
}


def in_form(rows: Sequence[Conversation], form: str) -> list[dict[str, Any]]:
    """The conversations as rows of a form in `FORMS`."""
    return [FORMS[form](row, number) for number, row in enumerate(rows)]


def mistaken(answer: str, number: int) -> str:
    """The line of JSON with one field wrong; `number` says which, in turn."""
    fields = json.loads(answer)
    match number % 4:
        case 0:
            fields["amount"] = round(fields["amount"] * 10, 2)
        case 1:
            fields["receipt"] = not fields["receipt"]
        case 2:
            year, month, day = fields["date"].split("-")
            fields["date"] = f"{year}-{int(month) % 12 + 1:02d}-{day}"
        case _:
            fields["category"] = "meals" if fields["category"] != "meals" else "travel"
    return json.dumps(fields)
