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
from qtune.export.folder import golden
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
    # what a model recommends must not reach the golden answers
    model.generation_config.update(do_sample=True, repetition_penalty=5.0, temperature=0.1)
    prompts = [golden.of_ids(trained.tokenizer, ids) for ids in ([5, 6, 7], [9, 8])]
    add_golden(folder, model, trained.tokenizer, prompts, max_new_tokens=3)
    written = json.loads((folder / "qtune.json").read_text())
    assert [entry["prompt_ids"] for entry in written["golden"]] == [[5, 6, 7], [9, 8]]
    for entry in written["golden"]:
        ids, rows = list(entry["prompt_ids"]), []
        while len(rows) < 3 and not (rows and ids[-1] in written["stop_ids"]):
            with torch.no_grad():
                rows.append(model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1))
            ids.append(int(rows[-1].argmax()))
        made = ids[len(entry["prompt_ids"]) :]
        assert entry["greedy_ids"] == made
        expected = [float(row[token]) for row, token in zip(rows, made, strict=True)]
        assert entry["greedy_logprobs"] == pytest.approx(expected, abs=0.03)
        assert entry["greedy_text"] == trained.tokenizer.decode(made, skip_special_tokens=True)


def test_golden_answer_ends_with_a_stop_token(
    train: Callable[..., Trained], tmp_path: Path
) -> None:
    trained = train()
    folder = export("bf16", trained, tmp_path / "bf16")
    model = reload("bf16", folder, trained.base_folder, CPU)
    prompts = [golden.of_ids(trained.tokenizer, [5, 6, 7])]
    add_golden(folder, model, trained.tokenizer, prompts, max_new_tokens=4)
    written = json.loads((folder / "qtune.json").read_text())
    made = written["golden"][0]["greedy_ids"]
    (folder / "qtune.json").write_text(json.dumps(written | {"stop_ids": [made[1]]}))
    add_golden(folder, model, trained.tokenizer, prompts, max_new_tokens=4)
    again = json.loads((folder / "qtune.json").read_text())["golden"][0]
    assert again["greedy_ids"] == made[: made.index(made[1]) + 1]
