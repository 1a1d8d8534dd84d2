"""The data section's own checks."""

from typing import Any

import pytest

from qtune.errors import UserError
from qtune.recipe_data import Data, Source, sources


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_length": 7}, "data.max_length (7) must be at least 8"),
        ({"train": ()}, "data.train names no source"),
        ({"test": ()}, "data.test names no source"),
        ({"validation": 0.0}, "data.validation (0.0) must be a share between 0 and 1"),
        ({"validation": 1.0}, "data.validation (1.0) must be a share between 0 and 1"),
        ({"streaming": True}, "data.streaming needs data.validation to name rows of its own"),
        ({"streaming": True, "validation": 0.1}, "data.streaming needs data.validation"),
    ],
)
def test_senseless_values(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        Data(**{"train": "t", **given})
    assert message in str(raised.value)


@pytest.mark.parametrize("given", [{"rows": 0}, {"weight": 0.0}, {"weight": -1.0}])
def test_senseless_sources(given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"source.{next(iter(given))}"):
        Source(path="a", **given)


def test_values_at_the_limits() -> None:
    made = Data(train="t", max_length=8, validation="v", streaming=True)
    assert made.max_length == 8 and made.streaming


def test_one_source_and_several() -> None:
    other = Source(path="b", weight=2.0)
    assert sources("a") == (Source(path="a"),)
    assert sources(other) == (other,)
    assert sources(("a", other)) == Data(train=("a", other)).train_sources
