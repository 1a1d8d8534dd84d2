"""A record through one format, as reading a source does it."""

import pytest

from qtune.data.convert import Converter
from qtune.data.values import BadRow
from qtune.recipe_data import Source


@pytest.fixture
def parts():
    def parts(name, record, **options):
        return Converter(Source(path="x.jsonl", format=name, **options)).parts(record)

    return parts


@pytest.fixture
def fault(parts):
    """The only fault of a record."""

    def fault(name, record):
        with pytest.raises(BadRow) as caught:
            parts(name, record)
        (found,) = caught.value.faults
        return found

    return fault
