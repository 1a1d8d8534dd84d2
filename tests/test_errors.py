import pytest

from qtune.errors import UserError


def test_it_is_a_value_error_that_reads_as_its_message():
    # so that callers of the library may catch what Python programmers expect
    with pytest.raises(ValueError, match=r"^r\.yaml:3:1: no such key$") as caught:
        raise UserError("r.yaml:3:1: no such key")
    assert str(caught.value) == "r.yaml:3:1: no such key"
