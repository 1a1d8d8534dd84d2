"""The demo as a source of rows: `demo:train?rows=400&seed=1&form=preference`."""

from typing import Any
from urllib.parse import parse_qsl

from qtune.data import demo
from qtune.data.demo_forms import FORMS, in_form
from qtune.errors import UserError


def records(path: str) -> list[dict[str, Any]]:
    """The records that a path names. UserError: no such split or option."""
    name, _, query = path.removeprefix("demo:").partition("?")
    if name not in demo.SIZES:
        raise UserError(f"{path}: no such split; use {', '.join(f'demo:{s}' for s in demo.SIZES)}")
    options = dict(parse_qsl(query, keep_blank_values=True))
    for key, value in options.items():
        if not _is_option(key, value):
            raise UserError(
                f"{path}: '{key}={value}' is not an option; write ?rows=500, ?seed=1 or ?form= "
                f"with {', '.join(FORMS)}"
            )
    count = int(options["rows"]) if "rows" in options else None
    conversations = demo.rows(name, count, int(options.get("seed", 0)))
    return in_form(conversations, options.get("form", "messages"))


def _is_option(key: str, value: str) -> bool:
    if key == "form":
        return value in FORMS
    return value.isdecimal() and (key == "seed" or (key == "rows" and value != "0"))
