"""YAML file and overrides -> Recipe, with every mistake shown at once at its place.

The file is read once for its values and their places (yaml_document), overrides are laid over it
with places of their own, and the result is checked as a whole (recipe_schema), so an override is
held to the same rules as the file and may also mend it.
"""

import dataclasses
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qtune.errors import UserError
from qtune.recipe import Recipe
from qtune.recipe_schema import Mistake, json_schema, validate
from qtune.yaml_document import Document, Keys, Place, Problem, dotted, parse, to_yaml

__all__ = ["dump", "json_schema", "load"]


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe in the YAML file `path` with overrides such as `train.lr=1e-5` applied.

    Raises UserError with all mistakes, each as `file:line:column: what; how to fix it` with the
    line, or as `override '...': what; how to fix it`.
    """
    document = _read(path)
    complaints = _apply(document, overrides)
    result = validate(document.values)
    problems = list(document.problems)
    if not isinstance(result, Recipe):
        problems += [Problem(_place(document, mistake), mistake.message) for mistake in result]
    # overrides have line 0 and come last
    problems.sort(key=lambda it: (not it.place.line, it.place.line, it.place.column))
    messages = [str(problem) for problem in problems] + complaints
    if messages or not isinstance(result, Recipe):
        raise UserError("\n".join(messages))
    return result


def dump(recipe: Recipe) -> str:
    """Return the YAML text of the recipe with every default written out; `load` reads it back."""
    return to_yaml(_plain(dataclasses.asdict(recipe)))


def _plain(value: Any) -> Any:
    match value:
        case Path():
            return str(value)
        case dict():
            return {key: _plain(item) for key, item in value.items()}
        case tuple():
            return [_plain(item) for item in value]
    return value


def _read(path: Path) -> Document:
    text = _text(path)
    lines = text.splitlines()

    def place_of(line: int, column: int) -> Place:
        return Place(str(path), line + 1, column + 1, lines[line] if line < len(lines) else "")

    document = parse(text, place_of)
    start = document.key_places.get(())
    if start is None or document.values is None:
        raise UserError(f"{path}: the recipe is empty; it needs model, data, train and run")
    if not isinstance(document.values, dict):
        raise UserError(start.show("a recipe is a mapping of keys; start with `model: NAME`"))
    return document


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{_similar(path)}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; name the recipe file in it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = data[error.start]
        message = f"byte 0x{byte:02x} is not UTF-8 text; save the file as UTF-8"
        raise UserError(f"{path}:{line}: {message}") from None


def _similar(path: Path) -> str:
    names = sorted(found.name for found in path.parent.glob("*.y*ml"))
    close = difflib.get_close_matches(path.name, names, n=1)
    if close:
        return f"; did you mean {path.parent / close[0]}?"
    return f"; in {path.parent} there are {', '.join(names)}" if names else ""


def _apply(document: Document, overrides: Sequence[str]) -> list[str]:
    """Lay the overrides over the document, later ones over earlier ones; return what is wrong."""
    complaints = []
    for text in overrides:
        try:
            _override(document, text, Place(f"override '{text}'"))
        except UserError as error:
            complaints.append(str(error))
    return complaints


def _override(document: Document, text: str, place: Place) -> None:
    name, equals, value = text.partition("=")
    keys = tuple(name.strip().split("."))
    if not equals or not all(keys):
        raise UserError(place.show("write it as key=value, e.g. train.lr=1e-5"))
    given = parse(value, lambda line, column: place)
    parent = _parent(document, keys, place)
    parent[keys[-1]] = given.values
    document.problems += given.problems
    _forget(document, keys)
    document.key_places[keys] = document.value_places[keys] = place
    document.key_places |= {(*keys, *inner): place for inner in given.key_places}
    document.value_places |= {(*keys, *inner): place for inner in given.value_places}


def _parent(document: Document, keys: Keys, place: Place) -> dict[str, Any]:
    """Return the mapping that holds `keys`, made where it is absent or empty."""
    parent: dict[str, Any] = document.values
    for depth, key in enumerate(keys[:-1], start=1):
        child = parent.get(str(key))
        if child is None:
            child = parent[str(key)] = {}
            document.key_places[keys[:depth]] = document.value_places[keys[:depth]] = place
        if not isinstance(child, dict):
            raise UserError(place.show(f"'{dotted(keys[:depth])}' is a value without keys"))
        parent = child
    return parent


def _forget(document: Document, keys: Keys) -> None:
    """Drop the places of what the override replaces."""
    for places in (document.key_places, document.value_places):
        for found in [found for found in places if found[: len(keys)] == keys]:
            del places[found]


def _place(document: Document, mistake: Mistake) -> Place:
    places = document.value_places if mistake.about == "value" else document.key_places
    if mistake.about == "fields":
        words = re.findall(r"\w+", mistake.message)
        named = [(*mistake.keys, word) for word in words if (*mistake.keys, word) in places]
        # an override is the likelier culprit: it came last
        named.sort(key=lambda keys: places[keys].line != 0)
        return places[named[0]] if named else places[mistake.keys]
    return places[mistake.keys]
