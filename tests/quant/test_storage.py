"""What a layer's storage says, and what it refuses."""

from typing import Any

import pytest

from qtune.errors import UserError
from qtune.quant.format import format_names
from qtune.quant.storage import Storage, check_group_size


def test_the_format_decides_where_nothing_is_said() -> None:
    assert (Storage("nf4").scale_kind, Storage("nf4").zero_kind) == ("dynamic", None)
    assert (Storage("int4").scale_kind, Storage("int4").zero_kind) == ("linear", "codes")
    other = Storage("int4", scales="half", zeros="float")
    assert (other.scale_kind, other.zero_kind) == ("half", "float")


def test_group_sizes_in_weights() -> None:
    shape = (6, 100)
    sizes = [Storage(group_size=size).weights_of_group(shape) for size in (32, "row", "tensor")]
    assert sizes == [32, 100, 600]


@pytest.mark.parametrize("size", [0, -64, 8, 48, 100, "rows", "64"])
def test_group_sizes_that_groups_cannot_have(size: Any) -> None:
    with pytest.raises(UserError, match=rf"group_size \({size}\) must be .* row or"):
        check_group_size(size)
    with pytest.raises(UserError, match=rf"group_size \({size}\)"):
        Storage(group_size=size)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"format": "nf5"}, "unknown format 'nf5'; there are: .*int8"),
        ({"format": "nf4", "zeros": "codes"}, "nf4 has no whole zero points"),
        ({"format": "int4", "activations": "int8"}, "is for format int8, not for int4"),
    ],
)
def test_what_does_not_go_together(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Storage(**wrong)


def test_every_format_has_a_storage() -> None:
    assert all(Storage(name).number_format.bits in (2, 3, 4, 8) for name in format_names())
