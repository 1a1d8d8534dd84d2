"""The model class: what evaluates a transformers model takes it as one."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from qtune.data.collate import collate
from qtune.data.rows import Row
from qtune.data.sample import Sample
from qtune.evaluate.generate import answer
from qtune.evaluate.perplexity import held_out

pytest.importorskip("xllamacpp")

from qtune.export.consumers.llamacpp import LlamaCppModel, load


@pytest.fixture(scope="module")
def expected(bases: dict[str, Path]) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        bases["llama"], dtype=torch.float32
    )
    return model


@pytest.fixture(scope="module")
def model(bases: dict[str, Path], gguf_path: Path) -> LlamaCppModel:
    return load(gguf_path, bases["llama"])


def test_logits_behind_padding(model: LlamaCppModel, expected: PreTrainedModel) -> None:
    ids = torch.tensor([[0, 0, 9, 70, 41], [8, 70, 41, 33, 12]])
    live = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with torch.no_grad():
        alone = expected(ids[:1, 2:]).logits[0], expected(ids[1:]).logits[0]
    found = model(ids, attention_mask=live).logits
    assert found.shape == (2, 5, 320) and found.dtype == torch.float32
    assert torch.equal(found[0, :2], torch.zeros(2, 320))
    assert torch.allclose(found[0, 2:], alone[0], atol=5e-3)
    assert torch.allclose(found[1], alone[1], atol=5e-3)


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([-1]), torch.tensor([0, 2])])
def test_logits_of_some_columns(model: LlamaCppModel, keep: int | torch.Tensor) -> None:
    ids = torch.tensor([[9, 70, 41, 5, 12]])
    whole = model(ids).logits
    columns = keep if isinstance(keep, torch.Tensor) else slice(-keep, None)
    assert torch.allclose(model(ids, logits_to_keep=keep).logits, whole[:, columns], atol=2e-3)


def test_columns_in_another_order_are_refused(model: LlamaCppModel) -> None:
    with pytest.raises(ValueError, match="ascending"):
        model(torch.tensor([[9, 70, 41]]), logits_to_keep=torch.tensor([2, 0]))


def test_too_many_rows_are_refused(model: LlamaCppModel) -> None:
    with pytest.raises(ValueError, match="at most 256 rows"):
        model(torch.ones(257, 2, dtype=torch.int64))


def test_held_out_loss(model: LlamaCppModel, expected: PreTrainedModel) -> None:
    torch.manual_seed(0)
    rows = [torch.randint(3, 259, (size,)).tolist() for size in (20, 35, 7)]
    samples = [
        Sample(f"t:{i}", ids, [0.0] * 4 + [1.0] * (len(ids) - 4)) for i, ids in enumerate(rows)
    ]
    batches = [collate(samples[:2]), collate(samples[2:])]
    truth = held_out(expected, batches, keep_tokens=40)
    found = held_out(model, batches, reference=truth.kept)
    assert found.loss == pytest.approx(truth.loss, abs=2e-3)
    assert found.kl is not None and found.kl < 1e-4 and found.top1 is not None and found.top1 > 0.95


def test_answers(model: LlamaCppModel, expected: PreTrainedModel, bases: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bases["llama"])
    rows = [
        Row("t", i, [{"role": "user", "content": text}, {"role": "assistant", "content": ""}])
        for i, text in enumerate(["a", "the longest question", "that"])
    ]
    made = [
        answer(which, tokenizer, rows, max_new_tokens=6, batch_size=2)
        for which in (model, expected)
    ]
    assert made[0].texts == made[1].texts
    assert made[0].num_tokens == made[1].num_tokens
