"""From the records of a source to the parts of rows, as the recipe's options say."""

import difflib
from collections.abc import Collection
from typing import Any

from qtune.data.columns import missing, named, no_object, renamed, unknown
from qtune.data.format import Parts, Record, all_columns, detect, load_format
from qtune.data.values import BadRow
from qtune.data.where import Where, has_column
from qtune.errors import UserError
from qtune.recipe_data import Source


class Converter:
    """The options of a source, applied to its records.

    UserError: the options cannot be understood.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._where = Where(source.where)
        # Columns that the recipe names and no record has had so far.
        self._unseen = {*source.columns.values(), *source.where}
        _check_names(source)

    def parts(self, record: Any) -> Parts | None:
        """The parts of a row; None where `where` leaves it out. Raises BadRow."""
        if not isinstance(record, dict):
            raise BadRow(no_object(record))
        if self._unseen:
            self._unseen = {name for name in self._unseen if not has_column(record, name)}
        if not self._where.takes(record):
            return None
        return self._formatted(renamed(record, self._source.columns))

    def finish(self) -> None:
        """Raise UserError where the recipe names a column that no record had."""
        if self._unseen:
            raise UserError(
                f"{self._source.path}: no row has a column {named(sorted(self._unseen))}, which "
                "the source names in columns or where"
            )

    def _formatted(self, record: Record) -> Parts:
        columns, name = self._source.columns, self._source.format
        found = detect(record) if name == "auto" else name
        if found is None:
            raise BadRow(unknown(record, columns))
        if not load_format(found).fits(record.keys()):
            raise BadRow(missing(record, found, columns))
        try:
            return load_format(found).parts(record)
        except BadRow as bad:
            raise BadRow(*(fault + self._own_names(fault) for fault in bad.faults)) from bad

    def _own_names(self, fault: str) -> str:
        """What the source calls the columns that a fault names as the format does."""
        pairs = self._source.columns.items()
        told = [
            f"'{name}' is the column '{column}'" for name, column in pairs if f"'{name}'" in fault
        ]
        return f" ({', '.join(told)})" if told else ""


def _check_names(source: Source) -> None:
    """Raise UserError where `columns` names something the format does not have."""
    if source.format == "auto":
        allowed, lacking = all_columns(), "no format has"
    else:
        allowed = load_format(source.format).columns
        lacking = f"format: {source.format} does not have"
    for name, column in source.columns.items():
        if name not in allowed:
            hint = _hint(name, column, allowed)
            raise UserError(f"data source: columns: {lacking} a column '{name}'; {hint}")


def _hint(name: str, column: str, allowed: Collection[str]) -> str:
    if column in allowed:
        return f"the format's name comes first: {{{column}: {name}}}"
    close = difflib.get_close_matches(name, sorted(allowed), n=1)
    return f"did you mean '{close[0]}'?" if close else f"there are {named(sorted(allowed))}"
