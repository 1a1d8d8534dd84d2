from pathlib import Path
from typing import Any

import pytest
import torch

from qtune.errors import UserError

pytest.importorskip("xllamacpp")

from qtune.export.consumers.llama_context import LlamaContext
from qtune.export.consumers.llama_file import LlamaFile

A, B = [5, 80, 7, 91, 12, 200, 33], [5, 80, 44]


@pytest.fixture(scope="module")
def file(gguf_path: Path) -> LlamaFile:
    return LlamaFile(gguf_path)


def test_rows_are_computed_apart(file: LlamaFile) -> None:
    """Each as if it were alone, however they are mixed, and in the order of the places."""
    alone = [LlamaContext(file, 1, 256).logits([row], [range(len(row))]) for row in (A, B)]
    both = LlamaContext(file, 2, 256).logits([A, B], [range(7), range(3)])
    assert torch.allclose(both, torch.cat(alone), atol=2e-3)
    some = LlamaContext(file, 2, 256).logits([A, B], [[1, 6], [2]])
    expected = torch.stack([alone[0][1], alone[0][6], alone[1][2]])
    assert torch.allclose(some, expected, atol=2e-3)


def test_only_what_is_new_is_computed(file: LlamaFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that go on, that turn off and that are asked for again."""
    context, computed = LlamaContext(file, 1, 256), []
    decode = context._decode
    monkeypatch.setattr(context, "_decode", lambda e: computed.append(len(e)) or decode(e))

    def last(row: list[int]) -> Any:
        fresh = LlamaContext(file, 1, 256).logits([row], [[len(row) - 1]])
        assert torch.allclose(context.logits([row], [[len(row) - 1]]), fresh, atol=2e-3)

    for row in (A[:5], A, [*A[:3], 9, 10], A[:2], A):
        last(row)
    assert computed == [5, 2, 2, 1, 5]


def test_what_lies_behind_the_places_is_not_computed(
    file: LlamaFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, computed = LlamaContext(file, 2, 256), []
    decode = context._decode
    monkeypatch.setattr(context, "_decode", lambda e: computed.append(len(e)) or decode(e))
    assert context.logits([A, B], [[1], []]).shape == (1, 320)
    assert computed == [2]
    assert context.logits([A, B], [[], []]).shape == (0, 320)


def test_long_rows_come_in_pieces(file: LlamaFile) -> None:
    torch.manual_seed(0)
    row = torch.randint(3, 259, (700,)).tolist()
    whole = LlamaContext(file, 1, 768).logits([row], [range(700)])
    steps = LlamaContext(file, 1, 768)
    parts = [steps.logits([row[: i + 100]], [range(i, i + 100)]) for i in range(0, 700, 100)]
    assert torch.allclose(whole, torch.cat(parts), atol=5e-3)


def test_a_row_that_is_too_long_is_told(file: LlamaFile) -> None:
    with pytest.raises(UserError, match=r"failed on .* tokens"):
        LlamaContext(file, 1, 256).logits([[5] * 300], [[299]])
