"""Losses and gradients against TRL's trainers: the same rows, tokenized and masked by TRL."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from qtune.data.sample import Sample
from qtune.recipe_train import Preference, Train
from qtune.train.objective import load_objective

PROMPTS = ["name the order", "what is the total of it", "say the date of the order", "who"]
GOOD = ["order twelve", "the total is 40 EUR in all", "on Monday", "nobody that we know of"]
BAD = ["no", "I cannot say what it is", "the date is the date of the order", "me"]
COMMON = {
    "per_device_train_batch_size": len(PROMPTS),
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "activation_checkpointing": False,
    "max_length": 64,
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


@pytest.fixture
def theirs(tiny_model: Path, twins: Any) -> PeftModel:
    """The tiny model as transformers and PEFT run it, in float32, with a fresh adapter.

    It does nothing yet: TRL takes the adapter that it is given for the reference.
    """
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    config = twins.model.peft_config["default"]
    plain = LoraConfig(
        task_type="CAUSAL_LM", r=config.r, lora_alpha=config.lora_alpha,
        target_modules=config.target_modules,
    )  # fmt: skip
    return get_peft_model(base, plain)


def copy_adapter(source: PeftModel, target: PeftModel) -> None:
    """Give the target the trained values of the source."""
    values = {name: p.detach() for name, p in source.named_parameters() if p.requires_grad}
    found = [(p, values[name]) for name, p in target.named_parameters() if name in values]
    assert len(found) == len(values)
    with torch.no_grad():
        for parameter, value in found:
            parameter.copy_(value)


def rows_of(batch: dict[str, Tensor], *, pairs: bool) -> list[Sample]:
    """The samples of a batch of TRL's: without padding, with the tokens that it scores."""
    samples = []
    masks = zip(batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True)
    for ids, live, learned in masks:
        n = int(live.sum())
        samples.append(Sample("t:1", ids[:n].tolist(), learned[:n].float().tolist()))
    if not pairs:
        return [
            Sample(each.place, each.ids, each.weights, label=bool(label))
            for each, label in zip(samples, batch["label"], strict=True)
        ]
    middle = len(samples) // 2
    return [
        Sample(good.place, good.ids, good.weights, rejected=bad)
        for good, bad in zip(samples[:middle], samples[middle:], strict=True)
    ]


def gradients(model: PeftModel) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(loss: Tensor, model: PeftModel, expected: Tensor, theirs: PeftModel) -> None:
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    found, truths = gradients(model), gradients(theirs)
    assert found and found.keys() == truths.keys()
    for name, truth in truths.items():
        assert (found[name] - truth).norm() < 1e-4 * truth.norm() + 1e-8, name


@pytest.fixture
def tokenizer(tiny_model: Path) -> Iterator[Any]:
    return AutoTokenizer.from_pretrained(tiny_model)


def test_dpo(theirs, twins, minimize, tokenizer, tmp_path):
    from trl import DPOConfig, DPOTrainer

    rows = {"prompt": PROMPTS, "chosen": GOOD, "rejected": BAD}
    trainer = DPOTrainer(
        model=theirs,
        args=DPOConfig(output_dir=tmp_path, beta=0.2, **COMMON),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
    )
    copy_adapter(twins.model, theirs)
    batch = next(iter(trainer.get_train_dataloader()))
    expected = trainer.compute_loss(trainer.model, batch)
    expected.backward()
    objective = load_objective(Train(objective="dpo", steps=1, preference=Preference(beta=0.2)))
    loss, figures = minimize(objective, twins.model, rows_of(batch, pairs=True))
    assert_same(loss, twins.model, expected, theirs)
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    for ours, name in [
        ("rewards/chosen", "rewards/chosen"),
        ("rewards/rejected", "rewards/rejected"),
        ("margin", "rewards/margins"),
        ("accuracy", "rewards/accuracies"),
    ]:
        assert figures[ours].item() == pytest.approx(logged[name], rel=1e-4, abs=1e-5), name


def test_dpo_with_label_smoothing(twins, minimize, rows):
    # DPOTrainer 1.16 does not use label_smoothing in its sigmoid loss; CPOTrainer has the formula
    from trl.experimental.cpo import CPOTrainer

    pairs = rows(pairs=True)
    ratios = [
        torch.stack(
            [twins.log_probs(part) - twins.log_probs(part, reference=True) for part in parts]
        )
        for parts in zip(*(pair.parts for pair in pairs), strict=True)
    ]
    settings = SimpleNamespace(
        alpha=0.0,
        beta=0.2,
        loss_type="sigmoid",
        label_smoothing=0.1,
        accelerator=SimpleNamespace(device="cpu"),
    )
    losses, chosen, _ = CPOTrainer.cpo_loss(settings, *ratios)
    losses.mean().backward()
    preference = Preference(beta=0.2, label_smoothing=0.1)
    objective = load_objective(Train(objective="dpo", steps=1, preference=preference))
    loss, figures = minimize(objective, twins.model, pairs)
    assert loss.item() == pytest.approx(losses.mean().item(), rel=1e-5)
    assert figures["rewards/chosen"].item() == pytest.approx(chosen.mean().item(), rel=1e-4)
    twins.assert_same_gradients()


# the answers' likelihood grows by a step of sft, and so KL becomes positive
@pytest.mark.parametrize("learned", [False, True])
def test_kto(learned, theirs, twins, minimize, tokenizer, tmp_path):
    from trl import KTOConfig, KTOTrainer

    rows = {
        "prompt": PROMPTS,
        "completion": GOOD[:2] + BAD[2:],
        "label": [True, True, False, False],
    }
    weights = {"beta": 0.5, "desirable_weight": 1.2, "undesirable_weight": 0.8}
    trainer = KTOTrainer(
        model=theirs,
        args=KTOConfig(output_dir=tmp_path, **weights, **COMMON),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    samples = rows_of(batch, pairs=False)
    if learned:
        minimize(load_objective(Train(steps=1)), twins.model, samples)
        for parameter in twins.model.parameters():
            if parameter.grad is not None:
                parameter.data -= parameter.grad
    copy_adapter(twins.model, theirs)
    expected = trainer.compute_loss(trainer.model, batch)
    expected.backward()
    objective = load_objective(Train(objective="kto", steps=1, preference=Preference(**weights)))
    loss, figures = minimize(objective, twins.model, samples)
    assert_same(loss, twins.model, expected, theirs)
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert (logged["kl"] > 0.01) == learned
    for ours, name in [
        ("rewards/chosen", "rewards/chosen"),
        ("rewards/rejected", "rewards/rejected"),
        ("margin", "rewards/margins"),
        ("kl", "kl"),
    ]:
        assert figures[ours].item() == pytest.approx(logged[name], rel=1e-4, abs=1e-5), name


def experimental_rows(trainer: Any, batch: dict[str, Tensor]) -> list[Sample]:
    """The samples of a batch of TRL's experimental trainers, whose labels are -100 elsewhere."""
    parts = []
    for kind in ("chosen", "rejected"):
        for ids, live, labels in zip(
            *(batch[f"{kind}_{name}"] for name in ("input_ids", "attention_mask", "labels")),
            strict=True,
        ):
            n = int(live.sum())
            parts.append(Sample("t:1", ids[:n].tolist(), (labels[:n] != -100).float().tolist()))
    middle = len(parts) // 2
    return [
        Sample(good.place, good.ids, good.weights, rejected=bad)
        for good, bad in zip(parts[:middle], parts[middle:], strict=True)
    ]


def test_simpo(theirs, twins, minimize, tokenizer, tmp_path):
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    rows = {"prompt": PROMPTS, "chosen": GOOD, "rejected": BAD}
    trainer = CPOTrainer(
        model=theirs,
        args=CPOConfig(
            output_dir=tmp_path,
            loss_type="simpo",
            cpo_alpha=0.0,
            beta=1.5,
            simpo_gamma=0.6,
            **COMMON,
        ),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
    )
    copy_adapter(twins.model, theirs)
    batch = next(iter(trainer.get_train_dataloader()))
    expected, logged = trainer.get_batch_loss_metrics(trainer.model, batch)
    expected.backward()
    preference = Preference(beta=1.5, margin=0.6)
    objective = load_objective(Train(objective="simpo", steps=1, preference=preference))
    loss, figures = minimize(objective, twins.model, experimental_rows(trainer, batch))
    assert_same(loss, twins.model, expected, theirs)
    assert figures["margin"].item() == pytest.approx(logged["rewards/margins"], rel=1e-4)


def test_orpo_where_the_likelihood_is_averaged_as_the_paper_says(
    theirs, twins, minimize, tokenizer, tmp_path
):
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    rows = {"prompt": PROMPTS, "chosen": GOOD, "rejected": BAD}
    trainer = ORPOTrainer(
        model=theirs,
        args=ORPOConfig(output_dir=tmp_path, beta=0.3, **COMMON),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
    )
    copy_adapter(twins.model, theirs)
    batch = next(iter(trainer.get_train_dataloader()))
    chosen, rejected, *_ = trainer.concatenated_forward(trainer.model, batch)
    odds_terms = trainer.odds_ratio_loss(chosen, rejected)[0]
    # TRL's likelihood term is of all tokens of the batch, prompts included
    expected = (-chosen - odds_terms).mean()
    expected.backward()
    objective = load_objective(Train(objective="orpo", steps=1, preference=Preference(beta=0.3)))
    loss, figures = minimize(objective, twins.model, experimental_rows(trainer, batch))
    assert_same(loss, twins.model, expected, theirs)
    _, logged = trainer.get_batch_loss_metrics(trainer.model, batch)
    assert figures["margin"].item() == pytest.approx(logged["rewards/margins"], rel=1e-4)
