"""YAML text as plain values together with the place of each of them.

PyYAML follows YAML 1.1, where `2e-4` is text, `no` a boolean and `1:30` the number ninety. Plain
scalars are resolved here by the core schema of YAML 1.2 instead. PyYAML composes the nodes, because
nodes know their line and column; the values are built here, so a tag never instantiates anything,
and a key that is given twice is noticed. Anchors, aliases and merge keys work.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from qtune.errors import UserError

Keys = tuple[str | int, ...]
"""The way to an entry from the top: keys of mappings and positions in lists."""

_TAG = "tag:yaml.org,2002:"
_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$")
_FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_SCALARS: dict[str, re.Pattern[str]] = {
    "null": _NULL,
    "bool": _BOOL,
    "int": _INT,
    "float": _FLOAT,
    "merge": re.compile(r"^<<$"),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012  (add_implicit_resolver below fills this class's own)


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as something else."""


for _name, _pattern in _SCALARS.items():
    _Loader.add_implicit_resolver(_TAG + _name, _pattern, None)
    _Dumper.add_implicit_resolver(_TAG + _name, _pattern, None)


@dataclass(frozen=True)
class Place:
    """Where a message points: a character of a file, or (line 0) an override as a whole."""

    source: str
    line: int = 0
    column: int = 0
    text: str = ""

    def show(self, message: str) -> str:
        """Return `source:line:column: message`, the line below it and a caret under the column."""
        if not self.line:
            return f"{self.source}: {message}"
        head = f"{self.source}:{self.line}:{self.column}: {message}"
        if not self.text.strip():
            return head
        # a tab is one column for PyYAML and must stay one here, or the caret drifts
        text = self.text.rstrip().replace("\t", " ")
        return f"{head}\n    {text}\n    {' ' * (self.column - 1)}^"


@dataclass(frozen=True)
class Problem:
    """One mistake and its place."""

    place: Place
    message: str

    def __str__(self) -> str:
        return self.place.show(self.message)


@dataclass
class Document:
    """Plain values (dict, list, text, numbers, booleans, None) and where each one stands."""

    values: Any
    key_places: dict[Keys, Place] = field(default_factory=dict)
    """The key of each entry; for items of a list, the item; for `()` the start of the document."""
    value_places: dict[Keys, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    """Keys given twice; the last one counts, so that checking can go on."""


Locate = Callable[[int, int], Place]
"""Turns PyYAML's line and column, both counted from 0, into a place."""


def parse(text: str, locate: Locate) -> Document:
    """Return the values of one YAML document; `locate` says what messages point at.

    Raises UserError, with the place, for text that is not YAML, and for YAML that no recipe needs:
    tags of one's own, keys that are not text, an anchor inside itself.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
        builder = _Builder(locate)
        document = builder.document
        document.values = None if node is None else builder.build(node, ())
    except yaml.MarkedYAMLError as error:
        raise UserError(_explain(error, locate)) from None
    except yaml.reader.ReaderError as error:
        raise UserError(_unprintable(error, text, locate)) from None
    return document


def plain(text: str) -> Any:
    """Return what `text` means without quotes: None, a bool, an int, a float, or itself."""
    if _NULL.match(text):
        return None
    if _BOOL.match(text):
        return text.lower() == "true"
    if _INT.match(text):
        return int(text, 0) if text.startswith(("0o", "0x")) else int(text)
    if _FLOAT.match(text):
        return float(text.replace(".", "", 1)) if text[-1].isalpha() else float(text)
    return text


def to_yaml(values: Any) -> str:
    """Return the YAML text of plain values; `parse` gives the same values back."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


class _Builder:
    """Turns nodes into values and notes where they stand."""

    def __init__(self, locate: Locate) -> None:
        self.locate = locate
        self.document = Document(None)
        self.merger = yaml.constructor.SafeConstructor()
        # Nodes, not their ids: an aliased node is met again and must not be merged twice.
        self.merged: list[yaml.Node] = []
        self.open: list[yaml.Node] = []

    def build(self, node: yaml.Node, keys: Keys) -> Any:
        place = self._place(node)
        self.document.value_places[keys] = place
        self.document.key_places.setdefault(keys, place)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if any(node is parent for parent in self.open):
            raise _error("an anchor stands inside itself; write the values out", node)
        self.open.append(node)
        children = dict(self._children(node, keys))
        self.open.pop()
        return children if isinstance(node, yaml.MappingNode) else list(children.values())

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        kind = node.tag.removeprefix(_TAG)
        if kind != "str" and kind not in _SCALARS:
            raise _error(f"unknown tag '{node.tag}'; write the value without it", node)
        return node.value if kind == "str" else plain(node.value)

    def _children(self, node: yaml.Node, keys: Keys) -> Iterator[tuple[str | int, Any]]:
        if node.tag not in (_TAG + "map", _TAG + "seq"):
            raise _error(f"unknown tag '{node.tag}'; write the value without it", node)
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                yield index, self.build(item, (*keys, index))
            return
        assert isinstance(node, yaml.MappingNode)
        for key_node, value_node in self._entries(node, keys):
            key = self._key(key_node)
            self.document.key_places[*keys, key] = self._place(key_node)
            yield key, self.build(value_node, (*keys, key))

    def _place(self, node: yaml.Node) -> Place:
        return self.locate(node.start_mark.line, node.start_mark.column)

    def _entries(self, node: yaml.MappingNode, keys: Keys) -> list[tuple[yaml.Node, yaml.Node]]:
        """Return the entries with merged ones first, so that the mapping's own win."""
        if not any(node is seen for seen in self.merged):
            self.merged.append(node)
            self._find_duplicates(node, keys)
            self.merger.flatten_mapping(node)
        entries: list[tuple[yaml.Node, yaml.Node]] = node.value
        return entries

    def _find_duplicates(self, node: yaml.MappingNode, keys: Keys) -> None:
        first: dict[str, yaml.Node] = {}
        for key_node, _ in node.value:
            if key_node.tag == _TAG + "merge":
                continue
            key = self._key(key_node)
            earlier = first.setdefault(key, key_node)
            if earlier is not key_node:
                self.document.problems.append(self._duplicate(key, earlier, key_node, keys))

    def _duplicate(self, key: str, earlier: yaml.Node, later: yaml.Node, keys: Keys) -> Problem:
        inside = f" in '{dotted(keys)}'" if keys else ""
        line = earlier.start_mark.line + 1
        message = f"key '{key}'{inside} is given twice, first in line {line}; remove one"
        return Problem(self._place(later), message)

    def _key(self, node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise _error("a key must be text, not a list or a mapping", node)
        if node.tag != _TAG + "str":
            raise _error(f"the key {node.value or 'null'} is not text; put it in quotes", node)
        key: str = node.value
        return key


def dotted(keys: Keys) -> str:
    """Return keys as they are written in an override, e.g. `train.betas.0`."""
    return ".".join(str(key) for key in keys)


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings by their keys, joined by points; empty mappings are leaves."""
    if not isinstance(values, dict) or not values:
        return {prefix: values}
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def _error(message: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=message, problem_mark=node.start_mark, note=_OWN)


_OWN = "worded here"
_QUOTE = "put the text in quotes"
_INDENT = "indent the keys of one mapping alike"
# What was opened is where the mistake is; PyYAML only notices further down.
_OPENED = {
    "while parsing a flow sequence": "this '[' is not closed; add ']', or quotes around the text",
    "while parsing a flow mapping": "this '{' is not closed; add '}', or quotes around the text",
    "while scanning a quoted scalar": "this quote is not closed; add the closing one",
    "while scanning a simple key": "the key has no ':'; write `key: value`",
}
_HINTS = {
    "mapping values are not allowed": f"put text that contains ': ' in quotes, and {_INDENT}",
    "expected <block end>": _INDENT,
    "but found another document": "a recipe is one document; remove the '---'",
    "found character": _QUOTE,
    "found undefined alias": _QUOTE,
}


def _explain(error: yaml.MarkedYAMLError, locate: Locate) -> str:
    mark = error.problem_mark
    assert mark is not None, "every error of PyYAML's scanner, parser and composer has a mark"
    place = locate(mark.line, mark.column)
    if error.note == _OWN:
        return place.show(str(error.problem))
    if "\t" in place.text[: len(place.text) - len(place.text.lstrip())]:
        return place.show("the line is indented with a tab; YAML wants spaces")
    if error.context in _OPENED and error.context_mark is not None:
        opened = locate(error.context_mark.line, error.context_mark.column)
        return opened.show(f"not valid YAML: {_OPENED[error.context]}")
    problem = error.problem or ""
    hints = [hint for start, hint in _HINTS.items() if problem.startswith(start)]
    advice = hints[0] if hints else "check quotes, brackets and indentation near here"
    return place.show(f"not valid YAML: {problem}; {advice}")


def _unprintable(error: yaml.reader.ReaderError, text: str, locate: Locate) -> str:
    before = text[: error.position]
    place = locate(before.count("\n"), error.position - (before.rfind("\n") + 1))
    return place.show(f"the character {text[error.position]!a} may not stand in YAML; remove it")
