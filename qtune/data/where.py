"""Which records a source gives: the recipe's `where`, column -> what its cell must be.

A cell must equal a value, be one of several, or pass a comparison: `>= 3`, `!= en`; `!=` alone says
that it must not be empty. Cells of text files hold text, so `3` and `true` also mean such texts.
A dot leads into an object: `meta.lang`. A column that is absent counts as an empty cell.
"""

import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from qtune.data.values import BadRow, is_blank, kind
from qtune.errors import UserError
from qtune.recipe_data import Plain

Test = Callable[[Any], bool]

_COMPARISON = re.compile(r"\s*(>=|<=|!=|>|<)\s*(.*?)\s*", re.DOTALL)
_ORDERED: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}


class Where:
    """The conditions of a source. UserError: one of them cannot be understood."""

    def __init__(self, conditions: Mapping[str, Plain | tuple[Plain, ...]]) -> None:
        self._tests = {column: _test(column, wanted) for column, wanted in conditions.items()}

    def takes(self, record: Mapping[str, Any]) -> bool:
        """Whether a record meets all conditions. Raises BadRow where a cell cannot be compared."""
        return all(_passes(record, column, test) for column, test in self._tests.items())


def has_column(record: Mapping[str, Any], column: str) -> bool:
    """Whether a record has the column, or the key of an object that `a.b` names."""
    return _find(record, column) is not _ABSENT


_ABSENT = object()


def _find(record: Any, column: str) -> Any:
    if not isinstance(record, Mapping):
        return _ABSENT
    if column in record:
        return record[column]
    first, dot, rest = column.partition(".")
    return _find(record.get(first), rest) if dot else _ABSENT


def _passes(record: Mapping[str, Any], column: str, test: Test) -> bool:
    cell = _find(record, column)
    if cell is _ABSENT:
        cell = None
    if isinstance(cell, list | dict):
        raise BadRow(f"'{column}' holds {kind(cell)}, which where cannot compare")
    try:
        return test(cell)
    except ValueError as error:
        raise BadRow(f"'{column}' is {cell!r}, which where cannot compare with a number") from error


def _test(column: str, wanted: Plain | tuple[Plain, ...]) -> Test:
    if isinstance(wanted, tuple):
        return lambda cell: any(_equals(cell, one) for one in wanted)
    found = _COMPARISON.fullmatch(wanted) if isinstance(wanted, str) else None
    if found is None:
        return lambda cell: _equals(cell, wanted)
    sign, operand = found.groups()
    if sign == "!=":
        return lambda cell: not (_equals(cell, operand) if operand else is_blank(cell))
    compare, limit = _ORDERED[sign], _limit(column, sign, operand)
    return lambda cell: not is_blank(cell) and compare(float(cell), limit)


def _limit(column: str, sign: str, operand: str) -> float:
    try:
        return float(operand)
    except ValueError as error:
        raise UserError(
            f"data source: where.{column}: '{sign} {operand}' compares with a number only; "
            f"write {column}: '{sign} 3'"
        ) from error


def _equals(cell: Any, wanted: Plain) -> bool:
    if cell is None:
        return False
    if isinstance(cell, bool) or isinstance(wanted, bool):
        return str(cell).strip().lower() == str(wanted).strip().lower()
    if isinstance(cell, str) and isinstance(wanted, str):
        return cell == wanted
    try:
        return float(cell) == float(wanted)
    except (TypeError, ValueError):
        return str(cell) == str(wanted)
