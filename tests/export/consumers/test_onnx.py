"""Padding, caches and broken files in front of ONNX Runtime, with a graph that can be counted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from qtune.errors import UserError
from qtune.export.exporter import Trained, export

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from qtune.export.consumers.onnx import OnnxModel, load


@pytest.fixture(scope="module")
def exported(
    train: Callable[..., Trained], tmp_path_factory: pytest.TempPathFactory
) -> tuple[OnnxModel, PreTrainedModel]:
    trained = train("llama")
    folder = export("onnx", trained, tmp_path_factory.mktemp("onnx") / "out")
    return load(folder), trained.model.float()


def padded(rows: list[list[int]], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    gaps = [[0] * (width - len(row)) for row in rows]
    pairs = list(zip(gaps, rows, strict=True))
    ids = [g + r if left else r + g for g, r in pairs]
    mask = [[0] * len(g) + [1] * len(r) if left else [1] * len(r) + [0] * len(g) for g, r in pairs]
    return torch.tensor(ids), torch.tensor(mask)


@pytest.mark.parametrize("left", [True, False])
def test_padding_is_as_if_it_were_not_there(
    left: bool, exported: tuple[OnnxModel, Any], rows: list[list[int]]
) -> None:
    model, truth = exported
    ids, mask = padded(rows, left)
    found = model(input_ids=ids, attention_mask=mask).logits
    for row, logits, live in zip(rows, found, mask.bool(), strict=True):
        expected = truth(input_ids=torch.tensor([row])).logits[0]
        assert torch.allclose(logits[live], expected, atol=1e-3)
        assert not logits[~live].any()


def test_rows_of_several_lengths_are_generated_together(
    exported: tuple[OnnxModel, Any], rows: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, truth = exported
    ids, mask = padded(rows, left=True)
    seen: list[tuple[int, ...]] = []
    run = model._run

    def counted(ids: Any, *rest: Any) -> Any:
        seen.append(ids.shape)
        return run(ids, *rest)

    monkeypatch.setattr(model, "_run", counted)
    plain = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0)
    # as evaluate/generate.py asks for them
    last = torch.tensor([-1])
    found = model.generate(
        input_ids=ids, attention_mask=mask, generation_config=plain, logits_to_keep=last
    )
    # each prompt once, and then one token of both rows at a time
    assert seen == [(1, len(row)) for row in rows] + [(2, 1)] * 7
    for row, answer in zip(rows, found[:, ids.shape[1] :], strict=True):
        one = truth.generate(input_ids=torch.tensor([row]), generation_config=plain)
        assert answer.tolist() == one[0, len(row) :].tolist()


def test_some_columns_alone(exported: tuple[OnnxModel, Any], rows: list[list[int]]) -> None:
    model, _ = exported
    ids = torch.tensor([rows[1]])
    every = model(input_ids=ids).logits
    kept = torch.tensor([2, 5])
    assert torch.equal(model(input_ids=ids, logits_to_keep=2).logits, every[:, -2:])
    assert torch.equal(model(input_ids=ids, logits_to_keep=kept).logits, every[:, kept])


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"model\.onnx"):
        load(tmp_path)
