import ctypes

import pytest

from qtune.errors import UserError

pytest.importorskip("xllamacpp")

from qtune.export.consumers import llama_library
from qtune.export.consumers.llama_library import CONTEXT_DEFAULTS, context_parameters, library


def numbers(parameters: llama_library.Parameters) -> tuple[int, ...]:
    return tuple((ctypes.c_uint32 * 5).from_buffer_copy(parameters.data))


def test_only_the_first_numbers_are_changed() -> None:
    found = library()
    assert numbers(found.llama_context_default_params())[:4] == CONTEXT_DEFAULTS
    changed = context_parameters(found, 640, 64, 32, 3)
    assert numbers(changed)[:4] == (640, 64, 32, 3)
    defaults = bytes(found.llama_context_default_params().data)
    # what llama.cpp fills; behind it is what was on the stack
    assert bytes(changed.data)[16:112] == defaults[16:112]


def test_another_layout_is_told_with_the_tested_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_library, "CONTEXT_DEFAULTS", (1, 2, 3, 4))
    with pytest.raises(UserError, match=rf"context_params.*=={llama_library.TESTED}"):
        library.__wrapped__()


def test_a_missing_function_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(llama_library._FUNCTIONS, "llama_no_such", (None, ()))
    with pytest.raises(UserError, match="it has no llama_no_such"):
        library.__wrapped__()


def test_a_missing_library_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_library, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install xllamacpp"):
        library.__wrapped__()
