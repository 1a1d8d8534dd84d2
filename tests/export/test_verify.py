"""The check itself: it sees small mistakes, and says where."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from qtune.errors import UserError
from qtune.export.exporter import Trained, export
from qtune.export.verify import add_golden, check_logits, reload

CPU = torch.device("cpu")


@pytest.fixture
def model(bases: dict[str, Path]) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(bases["qwen2"], dtype=torch.float32)


def test_same_model_agrees(model: PreTrainedModel, rows: list[list[int]]) -> None:
    found = check_logits(model, copy.deepcopy(model), rows)
    assert (found.change, found.top1) == (0, 1) and abs(found.kl) < 1e-6


def test_figures_are_those_of_the_definitions(model: PreTrainedModel) -> None:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.add_(torch.randn_like(other.lm_head.weight) * 0.01)
    found = check_logits(model, other, [[5, 6, 7]], max_change=10)
    with torch.no_grad():
        q, p = (m(torch.tensor([[5, 6, 7]])).logits[0].double() for m in (model, other))
    kl = torch.distributions.kl_divergence(
        *(torch.distributions.Categorical(logits=t) for t in (p, q))
    )
    assert found.kl == pytest.approx(float(kl.mean()), rel=1e-3)
    spread = (p - p.mean(-1, keepdim=True)).square().sum(-1)
    change = ((p - q) - (p - q).mean(-1, keepdim=True)).square().sum(-1)
    assert found.change == pytest.approx(float((change / spread).sqrt().mean()), rel=1e-3)


def test_one_wrong_layer_is_seen(model: PreTrainedModel, rows: list[list[int]]) -> None:
    other = copy.deepcopy(model)
    other.model.layers[0].mlp.up_proj.weight.data[:64].zero_()
    with pytest.raises(UserError, match=r"differs .* most in row [12] at token \d+ "):
        check_logits(other, model, rows)


def test_nan_is_seen_where_it_is(model: PreTrainedModel) -> None:
    other = copy.deepcopy(model)
    other.model.embed_tokens.weight.data[9] = torch.nan
    with pytest.raises(UserError, match=r"most in row 2 at token \d "):
        check_logits(other, model, [[4, 5, 6], [7, 8, 9]])


def test_other_vocabulary_is_told(model: PreTrainedModel) -> None:
    other = copy.deepcopy(model)
    other.resize_token_embeddings(300)
    with pytest.raises(UserError, match=r"has logits \[1, 300\], not \[1, 320\]"):
        check_logits(other, model, [[5]])


def test_check_leaves_training_mode_as_it_was(model: PreTrainedModel) -> None:
    model.train()
    check_logits(model, model, [[5, 6]])
    assert model.training


def test_folder_of_another_kind_is_refused(train: Callable[..., Trained], tmp_path: Path) -> None:
    folder = export("adapter", train(), tmp_path / "adapter")
    with pytest.raises(UserError, match="of the kind 'adapter', not 'bf16'"):
        reload("bf16", folder, tmp_path, CPU)
    with pytest.raises(UserError, match=r"is no export of qtune: it has no qtune.json"):
        reload("bf16", tmp_path, tmp_path, CPU)


def test_golden_answer_is_the_greedy_one(train: Callable[..., Trained], tmp_path: Path) -> None:
    trained = train()
    folder = export("bf16", trained, tmp_path / "bf16")
    model = reload("bf16", folder, trained.base_folder, CPU)
    add_golden(folder, model, [5, 6, 7], max_new_tokens=3)
    ids = [5, 6, 7]
    for _ in range(3):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    golden = json.loads((folder / "qtune.json").read_text())["golden"]
    assert golden["prompt_ids"] == [5, 6, 7]
    assert golden["greedy_ids"] == ids[3 : 3 + len(golden["greedy_ids"])]
