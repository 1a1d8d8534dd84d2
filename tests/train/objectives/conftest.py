"""A tiny model with an adapter that does something, and its float64 twin of plain parts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from qtune.data.collate import Batch, collate
from qtune.data.sample import Sample
from qtune.model.load import load_base
from qtune.train.objective import Figures, Objective, Step

LORA = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}


@dataclass
class Twins:
    """What is tested, and the truth: transformers and PEFT in float64, one sample per pass."""

    model: PeftModel
    truth: PeftModel

    def log_probs(self, part: Sample, *, reference: bool = False) -> Tensor:
        """Weighted sum of log-probabilities by the truth, float64 []."""
        if reference:
            with self.truth.disable_adapter(), torch.no_grad():
                return self._log_probs(part)
        return self._log_probs(part)

    def _log_probs(self, part: Sample) -> Tensor:
        ids = torch.tensor([part.ids])
        logits = self.truth(ids).logits[0, :-1].log_softmax(-1)
        picked = logits[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
        return (picked * torch.tensor(part.weights[1:], dtype=torch.float64)).sum()

    def gradients(self, of: str) -> dict[str, Tensor]:
        """Gradients of the adapter's matrices."""
        named = getattr(self, of).named_parameters()
        return {name: p.grad for name, p in named if p.requires_grad and p.grad is not None}

    def assert_same_gradients(self) -> None:
        found, truths = self.gradients("model"), self.gradients("truth")
        assert found and found.keys() == truths.keys()
        for name, truth in truths.items():
            assert (found[name].double() - truth).norm() < 1e-4 * truth.norm() + 1e-9, name


@pytest.fixture
def twins(tiny_model: Path) -> Twins:
    """The tiny model in float32, run qtune's way, and its twin, with the same random adapter."""
    base = load_base(tiny_model, None, device=torch.device("cpu"), dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    plain.requires_grad_(False)
    config = LoraConfig(**LORA, lora_alpha=8, init_lora_weights=False)
    model, truth = get_peft_model(base, config), get_peft_model(plain, config)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in truth.named_parameters():
            if name in trained:
                values = torch.randn(parameter.shape, generator=generator) * 0.1
                trained[name].copy_(values)
                parameter.data = values.double()
    return Twins(model.train(), truth)


def answer(generator: torch.Generator, prompt: Sequence[int], weight: float = 1.0) -> Sample:
    length = int(torch.randint(3, 9, (), generator=generator))
    ids = torch.randint(3, 512, (length,), generator=generator).tolist()
    weights = [0.0] * len(prompt) + [weight] * length
    return Sample("t:1", [*prompt, *ids], weights)


@pytest.fixture
def rows() -> Callable[..., list[Sample]]:
    """A maker of random samples: `pairs`, labelled ones, or plain ones."""

    def make(number: int = 5, *, pairs: bool = False, labels: bool = False) -> list[Sample]:
        generator = torch.Generator().manual_seed(1)
        samples = []
        for i in range(number):
            prompt = torch.randint(3, 512, (4 + 3 * i,), generator=generator).tolist()
            chosen = answer(generator, prompt)
            rejected = answer(generator, prompt) if pairs else None
            label = i % 3 != 0 if labels else None
            samples.append(Sample(f"t:{i}", chosen.ids, chosen.weights, 0, rejected, label))
        return samples

    return make


def single_process(samples: Sequence[Sample], size: int = 2) -> Step:
    """A step of one process that takes `size` rows at a time."""

    def batches(given: Sequence[Sample]) -> list[Batch]:
        return [collate(given[i : i + size], multiple=16) for i in range(0, len(given), size)]

    return Step(samples, batches, lambda tensor: tensor)


@pytest.fixture
def minimize() -> Callable[..., tuple[Tensor, Figures]]:
    """Backward through a step in micro-batches: the mean loss and figures, as the loop has them."""

    def step(
        objective: Objective, model: PeftModel, samples: Sequence[Sample], size: int = 2
    ) -> tuple[Tensor, Figures]:
        model.zero_grad()
        count = objective.count(samples)
        given = single_process(samples, size)
        shared = objective.shared(model, given)
        total, figures = torch.zeros(()), dict.fromkeys(objective.figures, torch.zeros(()))
        for batch in given.batches(samples):
            loss, found = objective.loss(model, batch, shared)
            assert tuple(found) == objective.figures
            (loss / count).backward()
            total = total + loss.detach() / count
            figures = {name: figures[name] + found[name] / count for name in figures}
        return total, figures

    return step
