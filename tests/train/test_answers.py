"""Whole answers under a model and under its reference, the same base without the adapter."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from warm import run_ranks

from qtune.data.collate import collate
from qtune.data.sample import Sample
from qtune.model.load import add_adapter, load_base
from qtune.recipe import Lora
from qtune.train.answers import (
    PAIR_FIGURES,
    adapter_off,
    answers,
    pair_figures,
    reference_answers,
    split_pairs,
)
from qtune.train.batches import nothing_learned


@pytest.fixture
def model(tiny_model: Path) -> PeftModel:
    """The tiny model in float32, in training, with an adapter that does something and dropout."""
    base = load_base(tiny_model, None, device=torch.device("cpu"), dtype=torch.float32)
    adapted = add_adapter(base, Lora(rank=4, alpha=8, dropout=0.3))
    torch.manual_seed(0)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * 0.1
    return adapted.train()


def sample(seed: int, length: int, weights: list[float]) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 512, (length,), generator=generator).tolist()
    return Sample(f"t:{seed}", ids, [0.0] * (length - len(weights)) + weights)


PAIRS = [
    replace(sample(1, 9, [1.0] * 4), rejected=sample(2, 7, [1.0] * 2)),
    replace(sample(3, 5, [1.0, 0.5]), rejected=sample(4, 12, [2.0] * 3)),
]
PARTS = [part for pair in PAIRS for part in pair.parts]


def test_sums_and_means_are_those_of_each_answer_alone(model):
    model.eval()
    found = answers(model, collate(PAIRS, multiple=16))
    assert found.num_tokens.tolist() == [4, 2, 1.5, 6]
    for i, part in enumerate(PARTS):
        ids = torch.tensor([part.ids])
        scores = model(ids).logits[0, :-1].log_softmax(-1)
        picked = scores[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
        truth = (picked * torch.tensor(part.weights[1:])).sum()
        assert found.log_probs[i].item() == pytest.approx(truth.item(), rel=1e-5)
        assert found.mean[i].item() == pytest.approx(truth.item() / sum(part.weights), rel=1e-5)


def test_the_reference_is_the_base_without_adapter_dropout_and_gradient(model, tiny_model):
    batch = collate(PAIRS)
    state = torch.get_rng_state()
    found = reference_answers(model, batch).log_probs
    assert torch.equal(torch.get_rng_state(), state) and not found.requires_grad
    assert model.training and all(m.training for m in model.modules())
    base = load_base(tiny_model, None, device=torch.device("cpu"), dtype=torch.float32)
    torch.testing.assert_close(found, answers(base, batch).log_probs, rtol=1e-6, atol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    ids = torch.tensor([PARTS[0].ids])
    scores = plain(ids).logits[0, :-1].log_softmax(-1)
    truth = scores[torch.arange(8), ids[0, 1:]][-4:].sum()
    assert found[0].item() == pytest.approx(truth.item(), rel=1e-5)
    # the adapter is on again
    assert not torch.allclose(answers(model.eval(), batch).log_probs, found)


def test_parameters_keep_their_flags_while_the_adapter_is_off(model):
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with adapter_off(model):
        assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_rows_in_which_nothing_is_learned_have_no_answers_and_a_zero_gradient(model):
    batch = nothing_learned(collate(PAIRS))
    found = answers(model, batch).log_probs
    chosen, rejected = split_pairs(batch, found)
    assert found.shape == (0,)
    (chosen - rejected).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(grad is not None and not grad.any() for grad in gradients)


def test_figures_of_pairs_are_sums():
    chosen, rejected = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 2.5, 1.0])
    figures = pair_figures(chosen, rejected)
    assert tuple(figures) == PAIR_FIGURES
    assert [value.item() for value in figures.values()] == [6.0, 3.5, 2.0, 2.5]


def test_objectives_with_a_reference_give_two_processes_the_gradient_of_one(tiny_model):
    program = Path(__file__).with_name("objective_processes.py")
    said = run_ranks(program, tiny_model)
    assert all(said.count(f"{done} ok") == 2 for done in ("ddp", "fsdp", "flags"))
