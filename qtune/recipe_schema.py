"""Plain values -> Recipe, or every mistake in them, in the words of someone who writes a recipe.

pydantic checks the stdlib dataclasses of qtune.recipe; it is imported on first use, because
`--help` must not wait for it. The values are handed over as JSON, since only there do pydantic's
strict rules mean what a recipe needs: a list becomes a tuple and text a path, an int may stand for
a float, and nothing else is converted.
"""

import difflib
import functools
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qtune.recipe import Recipe
from qtune.yaml_document import Keys, dotted, plain

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from pydantic_core import ErrorDetails

_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "dataclass_type": "a mapping",
}
# what a key is called elsewhere, or was called here
_OTHER_NAMES = {"gradient_checkpointing": "recompute", "activation_checkpointing": "recompute"}


@dataclass(frozen=True)
class Mistake:
    """What is wrong with the entry at `keys`; `about` says what the message is to point at."""

    keys: Keys
    message: str
    about: str
    """`key`, `value`, or `fields`: several keys of the mapping, named in the message."""


def validate(values: Mapping[str, Any]) -> Recipe | list[Mistake]:
    """Return the recipe that `values` describe, or all mistakes in them."""
    from pydantic import ValidationError

    try:
        return _adapter().validate_json(json.dumps(values))
    except ValidationError as error:
        return _mistakes(error.errors(include_url=False), values)


@functools.cache
def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe, with the fields' docstrings as descriptions."""
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return {**dialect, **_adapter().json_schema()}


@functools.cache
def _adapter() -> "TypeAdapter[Recipe]":
    from pydantic import ConfigDict, TypeAdapter, with_config

    config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
    # pydantic's own way of configuring a stdlib dataclass; nested ones inherit it
    return TypeAdapter(with_config(config)(Recipe))


def _mistakes(errors: Iterable["ErrorDetails"], values: Any) -> list[Mistake]:
    """One mistake per entry: the branches of a union complain one by one and are joined here."""
    mistakes: list[Mistake] = []
    wrong: dict[Keys, list[ErrorDetails]] = defaultdict(list)
    for error in errors:
        keys = _entry(error["loc"], values)
        if error["type"] == "unexpected_keyword_argument":
            mistakes.append(Mistake(keys, _unknown(keys), "key"))
        elif error["type"] == "missing" and isinstance(error["loc"][-1], str):
            mistakes.append(Mistake(keys, _missing((*keys, error["loc"][-1])), "key"))
        elif error["type"] == "value_error":
            mistakes.append(Mistake(keys, str(error["ctx"]["error"]), "fields"))
        else:
            wrong[keys].append(error)
    deepest = [mistake.keys for mistake in mistakes] + [keys for keys in wrong if keys]
    for keys, group in wrong.items():
        # `target_modules: [q_proj, 3]` is not text, but what its author got wrong is the 3; and a
        # mapping with a misspelt key was meant to be one
        inside = [other for other in deepest if other[: len(keys)] == keys]
        if inside == [keys]:
            mistakes.append(Mistake(keys, _wrong(group, _get(values, keys)), "value"))
    return mistakes


def _entry(location: tuple[int | str, ...], values: Any) -> Keys:
    """Return the steps of `location` that exist; pydantic names union branches in between."""
    keys: list[str | int] = []
    for step in location:
        is_key = isinstance(values, dict) and step in values
        if is_key or (isinstance(values, list) and step in range(len(values))):
            values = values[step]
            keys.append(step)
    return tuple(keys)


def _get(values: Any, keys: Keys) -> Any:
    for key in keys:
        values = values[key]
    return values


def known_keys(section: Keys) -> dict[str, str]:
    """Return the keys that the mapping at `section` may have, with their help texts."""
    properties = _node(section)["properties"]
    return {name: entry.get("description", "") for name, entry in properties.items()}


def _node(section: Keys) -> dict[str, Any]:
    """The schema of the mapping at `section`."""
    node = schema = json_schema()
    for key in section:
        # the items of a list are known at its field
        if isinstance(key, str):
            node = schema["$defs"][_mapping_of(node["properties"][key])]
    return node


def _mapping_of(field: Any) -> str:
    """The name of the mapping that a field of the schema may be, or hold as items; or nothing."""
    if "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2]
    inside = [*field.get("anyOf", ()), *filter(None, [field.get("items")])]
    return next((name for each in inside if (name := _mapping_of(each))), "")


def _sections(section: Keys = ()) -> list[Keys]:
    """The mappings of a recipe, outermost first."""
    fields = _node(section)["properties"].items()
    inner = [(*section, name) for name, field in fields if "$ref" in field]
    return [section, *(found for each in inner for found in _sections(each))]


def _unknown(keys: Keys) -> str:
    section, key = keys[:-1], str(keys[-1])
    inside = f" in '{dotted(section)}'" if section else ""
    homes = [home for home in _sections() if key in known_keys(home)]
    if homes:
        home = f"in '{dotted(homes[0])}'" if homes[0] else "at the top level"
        return f"unknown key '{key}'{inside}; it belongs {home}"
    names = list(known_keys(section))
    close = difflib.get_close_matches(_OTHER_NAMES.get(key, key), names, n=1)
    if close:
        return f"unknown key '{key}'{inside}; did you mean '{close[0]}'?"
    return f"unknown key '{key}'{inside}; known are {', '.join(names)}"


def _missing(keys: Keys) -> str:
    section, key = keys[:-1], str(keys[-1])
    inside = f" in '{dotted(section)}'" if section else ""
    help_text = known_keys(section)[key]
    return f"missing key '{key}'{inside}; add `{key}:`" + (f" ({help_text})" if help_text else "")


def _wrong(errors: list["ErrorDetails"], value: Any) -> str:
    if errors[0]["type"] == "missing":
        return f"expected a list of {len(value) + len(errors)} values, got {len(value)}"
    if errors[0]["type"] == "too_long":
        return f"expected a list of {errors[0]['ctx']['max_length']} values, got {len(value)}"
    if errors[0]["type"] == "finite_number":
        return "expected a finite number; infinity and nan make no sense here"
    expected = [_expected(error) for error in errors]
    message = f"expected {' or '.join(expected)}, got {_describe(value)}"
    hint = _choice_hint(errors[0], value) or _hint(expected, value)
    return message + (f"; {hint}" if hint else "")


def _expected(error: "ErrorDetails") -> str:
    if error["type"] == "literal_error":
        return str(error["ctx"]["expected"])
    return _EXPECTED.get(error["type"]) or error["msg"]


def _describe(value: Any) -> str:
    match value:
        case None:
            return "nothing (null)"
        case bool():
            return str(value).lower()
        case str():
            return f"the text '{value}'"
        case list():
            return "a list"
        case dict():
            return "a mapping"
    return f"the number {value}"


def _choice_hint(error: "ErrorDetails", value: Any) -> str:
    if error["type"] != "literal_error" or not isinstance(value, str):
        return ""
    choices = error["ctx"]["expected"].replace(" or ", ", ").split(", ")
    close = difflib.get_close_matches(value, [choice.strip("'") for choice in choices], n=1)
    return f"did you mean '{close[0]}'?" if close else ""


def _hint(expected: list[str], value: Any) -> str:
    """Return how to write what was probably meant, or nothing."""
    wanted = expected[0]
    if value is None:
        return "give it a value or, for the default, remove the key"
    if wanted == "text" and not isinstance(value, list | dict):
        return "put it in quotes"
    if isinstance(value, str) and wanted in ("a whole number", "a number", "true or false"):
        return _text_hint(wanted, value)
    if wanted == "a list" and isinstance(value, str):
        return f"write [{value}]"
    if wanted == "a whole number" and isinstance(value, float) and value.is_integer():
        return f"write {int(value)}"
    return ""


def _text_hint(wanted: str, value: str) -> str:
    if not isinstance(plain(value), str):
        return "remove the quotes"
    bare = value.replace("_", "")
    if wanted == "true or false":
        switch = {"yes": "true", "on": "true", "no": "false", "off": "false"}.get(value.lower())
        return f"write {switch}" if switch else ""
    return f"write {bare}" if isinstance(plain(bare), int | float) else ""
