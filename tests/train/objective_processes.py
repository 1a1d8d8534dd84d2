"""Run by each of two processes: an objective's gradient, alone, under DDP and under FSDP.

Started as `python objective_processes.py MODEL_FOLDER` with the variables of torch.distributed;
fails where the three differ.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn

from qtune.data.collate import Batch, collate
from qtune.data.sample import Sample
from qtune.model.load import add_adapter, load_base
from qtune.recipe import Lora, Quant
from qtune.recipe_train import Train
from qtune.train import parallel
from qtune.train.answers import reference_answers
from qtune.train.batches import Batches
from qtune.train.objective import Step, load_objective

# one that has a reference, and one that looks at all rows first
OBJECTIVES = ("dpo", "kto")
# two of the longest samples do not fit
MAX_TOKENS = 40


def rows(objective: str) -> list[Sample]:
    """Five random samples, so that one process gets more of them than the other."""
    generator = torch.Generator().manual_seed(1)

    def sample(prompt: list[int], label: bool | None = None) -> Sample:
        ids = torch.randint(3, 512, (9,), generator=generator).tolist()
        return Sample("t:1", prompt + ids, [0.0] * len(prompt) + [1.0] * 9, label=label)

    found = []
    for i in range(5):
        prompt = torch.randint(3, 512, (4 + 3 * i,), generator=generator).tolist()
        good = sample(prompt, label=i % 2 == 0 if objective == "kto" else None)
        if objective == "dpo":
            good = Sample(good.place, good.ids, good.weights, rejected=sample(prompt))
        found.append(good)
    return found


def fresh(folder: str, target_modules: str | tuple[str, ...] = "all-linear") -> PeftModel:
    """The same adapted model every time."""
    base = load_base(Path(folder), Quant(), device=torch.device("cpu"), dtype=torch.float32)
    torch.manual_seed(0)
    model = add_adapter(base, Lora(rank=4, alpha=8, target_modules=target_modules))
    # answers that are likelier than for the base have a KL above 0
    sft, samples = load_objective(Train(steps=1)), rows("kto")
    loss, _ = sft.loss(model.train(), collate(samples), None)
    (loss / sft.count(samples)).backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.data -= 5 * parameter.grad
    model.zero_grad()
    return model


def alone(samples: Sequence[Sample]) -> list[Batch]:
    """The rows of a step, one after the other, as a single process may take them."""
    return [collate([sample]) for sample in samples]


def gradients(
    name: str,
    model: PeftModel,
    called: nn.Module,
    batches: Callable[[Sequence[Sample]], Iterable[Batch]],
    accelerator: Accelerator | None = None,
) -> dict[str, Tensor]:
    """Loss, figures and whole gradients of a step."""
    samples, objective = rows(name), load_objective(Train(objective=name, steps=1))
    count, processes = objective.count(samples), 1
    total: Callable[[Tensor], Tensor] = partial(torch.mul, other=1)
    if accelerator is not None:
        processes = accelerator.num_processes
        total = partial(parallel.total, accelerator=accelerator)
    shared = objective.shared(model, Step(samples, batches, total))
    sums = torch.zeros(1 + len(objective.figures))
    given = list(batches(samples))
    for i, batch in enumerate(given):
        last = accelerator is None or i == len(given) - 1
        with nullcontext() if last else parallel.without_sync(called, accelerator):
            loss, figures = objective.loss(called, batch, shared)
            (loss * processes / count).backward()
        sums += torch.stack([loss.detach(), *figures.values()]) / count
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    found = {n: parallel.whole(p.grad) for n, p in trained if p.grad is not None}
    model.zero_grad()
    return {"sums": total(sums), **found}


def main() -> None:
    """Compare, for every objective and both ways to share the work."""
    accelerator = parallel.open_accelerator()
    batches = Batches(accelerator, MAX_TOKENS, packing=True)
    model = fresh(sys.argv[1])
    truths = {name: gradients(name, model, model, alone) for name in OBJECTIVES}
    assert truths["kto"]["sums"][-1] > 0.01, "no KL, no test of it"
    for how in ("ddp", "fsdp"):
        model = fresh(sys.argv[1])
        called = parallel.distribute(model, accelerator, how)
        for name, truth in truths.items():
            found = gradients(name, model, called, batches, accelerator)
            assert found.keys() == truth.keys(), (how, name, truth.keys() - found.keys())
            for key, expected in truth.items():
                difference = (found[key] - expected).norm()
                assert difference < 1e-4 * expected.norm() + 1e-7, (how, name, key, difference)
        print(f"{how} ok", flush=True)
    # FSDP keeps the group of the head gathered after a pass without a backward pass
    model = fresh(sys.argv[1], ("q_proj", "lm_head"))
    called = parallel.distribute(model, accelerator, "fsdp")
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    for batch in batches(rows("dpo")):
        reference_answers(called, batch)
    parallel.settle(called)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    print("flags ok", flush=True)


if __name__ == "__main__":
    main()
