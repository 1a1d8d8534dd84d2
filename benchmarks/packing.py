"""Seconds of a training step with packed rows and with padded ones, on the same samples.

    python benchmarks/packing.py --data gsm8k-train.jsonl --threads 2

Real data have rows of very different lengths. Every round takes the samples of the next optimizer
step and makes its gradient three times, from the same weights: packed (`qtune`'s default), padded
with rows of similar length together (`data.packing: false`), and padded as rows come, as many in a
batch as packing takes on average, which is what other trainers do by default. Rounds begin with
another variant each time, so that other load on the machine hits all alike; ratios are of the same
round. The three losses must agree. Between rounds the optimizer steps, which is not timed.

Data are rows with `question` and `answer` (GSM8K has these) or any that a recipe takes; without
--data the demo's. Prints a table and writes benchmarks/results/packing.json.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from qtune.data.collate import ROW_MULTIPLE, collate
from qtune.data.feed import Feed
from qtune.data.order import micro_batches, padded_length
from qtune.data.sample import Sample
from qtune.environment import environment
from qtune.files import write_text
from qtune.machine import keeping_freed_memory
from qtune.model.forward import check_packing, packs
from qtune.model.load import add_adapter, load_base
from qtune.recipe import Data, Recipe, Train
from qtune.recipe_data import Source
from qtune.setup import open_setup
from qtune.train.objective import load_objective
from qtune.train.optim import make_optimizer

RESULTS = Path(__file__).parent / "results/packing.json"
WARM_UP = 2
# relative: 16-bit rounding of sums in another order makes 0.001
MOST_DIFFERENCE = 0.01
QUESTIONS = {"instruction": "question", "output": "answer"}

Groups = list[list[Sample]]


def packed(samples: Sequence[Sample], max_tokens: int) -> Groups:
    """Best-fit bins."""
    return micro_batches(samples, max_tokens)


def padded_alike(samples: Sequence[Sample], max_tokens: int) -> Groups:
    """Groups of similar length."""
    return micro_batches(samples, max_tokens, packing=False)


def padded_as_they_come(samples: Sequence[Sample], max_tokens: int) -> Groups:
    """So many rows in a group as fit into the tokens on average."""
    mean = sum(sample.num_tokens for sample in samples) / len(samples)
    size = max(1, int(max_tokens / mean))
    return [list(samples[at : at + size]) for at in range(0, len(samples), size)]


VARIANTS = {
    "packed": packed,
    "padded, similar lengths together": padded_alike,
    "padded as they come": padded_as_they_come,
}
BASELINE = "packed"


class Trainer:
    """A model under training, whose steps are timed."""

    def __init__(self, recipe: Recipe, folder: Path, device: torch.device) -> None:
        base = load_base(folder, recipe.quant, device=device)
        check_packing(base)
        if not packs(base):
            raise SystemExit(f"{recipe.model} is not trained on packed rows")
        self._model = add_adapter(base, recipe.lora).train()
        self._objective, self._device = load_objective(recipe.train), device
        self._optimizer = make_optimizer(self._model, recipe.train)

    def gradient(self, samples: Sequence[Sample], groups: Groups, packing: bool) -> float:
        """Leave the gradient of the mean loss of these samples; that loss."""
        self._optimizer.zero_grad()
        count, total = self._objective.count(samples), 0.0
        for group in groups:
            batch = collate(group, self._device, multiple=ROW_MULTIPLE, packing=packing)
            loss, _ = self._objective.loss(self._model, batch, None)
            (loss / count).backward()
            total += float(loss.detach()) / count
        return total

    def update(self) -> None:
        """Let the optimizer take its step."""
        nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()


def measure(trainer: Trainer, feed: Feed, rounds: int, max_tokens: int) -> list[dict[str, Any]]:
    """By round, what each variant took, after the warm-up. ValueError: their losses differ."""
    names, found = list(VARIANTS), []
    for step in range(WARM_UP + rounds):
        samples = feed.batch(step)
        first = step % len(names)
        took = {
            name: timed(trainer, samples, name, max_tokens)
            for name in names[first:] + names[:first]
        }
        check_losses({name: each["loss"] for name, each in took.items()})
        trainer.update()
        found.append({"tokens": sum(sample.num_tokens for sample in samples), "variants": took})
    return found[WARM_UP:]


def timed(
    trainer: Trainer, samples: Sequence[Sample], name: str, max_tokens: int
) -> dict[str, float]:
    """Seconds of a step's gradient, its loss, and the positions that the model computed."""
    start = time.perf_counter()
    groups = VARIANTS[name](samples, max_tokens)
    loss = trainer.gradient(samples, groups, packing=name == BASELINE)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "loss": loss, "positions": positions(groups, name == BASELINE)}


def positions(groups: Groups, packing: bool) -> int:
    """Tokens and padding in all rows."""
    if packing:
        sizes = [sum(sample.num_tokens for sample in group) for group in groups]
        return sum(size + -size % ROW_MULTIPLE for size in sizes)
    return sum(
        len(group) * padded_length(max(sample.num_tokens for sample in group)) for group in groups
    )


def check_losses(losses: dict[str, float]) -> None:
    """ValueError unless all are about the same."""
    truth = losses[BASELINE]
    if not all(abs(loss - truth) <= MOST_DIFFERENCE * truth for loss in losses.values()):
        raise ValueError(f"the losses of one step differ: {losses}")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "q1": low, "q3": high}


def summaries(rounds: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By variant: seconds per step, tokens per second without padding, ratios, padding."""
    tokens = [each["tokens"] for each in rounds]
    found = {}
    for name in VARIANTS:
        own = [each["variants"][name] for each in rounds]
        seconds = [each["seconds"] for each in own]
        fastest = [each["variants"][BASELINE]["seconds"] for each in rounds]
        found[name] = {
            "step_s": spread(seconds),
            "tokens_per_s": spread([n / s for n, s in zip(tokens, seconds, strict=True)]),
            "packed_is_faster": spread([s / f for s, f in zip(seconds, fastest, strict=True)]),
            "padding_share": 1 - sum(tokens) / sum(each["positions"] for each in own),
            "seconds": seconds,
        }
    return found


def table(variants: dict[str, dict[str, Any]]) -> str:
    """Medians with quartiles, one variant a line."""
    lines = [
        "| variant | seconds per step | tokens/s | time to that of packed | padding |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, found in variants.items():
        step, speed, ratio = found["step_s"], found["tokens_per_s"], found["packed_is_faster"]
        cells = (
            name,
            f"{step['median']:.2f} ({step['q1']:.2f}-{step['q3']:.2f})",
            f"{speed['median']:.0f} ({speed['q1']:.0f}-{speed['q3']:.0f})",
            f"{ratio['median']:.2f}x ({ratio['q1']:.2f}-{ratio['q3']:.2f})",
            f"{found['padding_share']:.0%}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def recipe_of(chosen: argparse.Namespace) -> Recipe:
    """The recipe whose steps are measured."""
    train: str | Source = "demo:train"
    if chosen.data is not None:
        with chosen.data.open(encoding="utf-8") as file:
            question = "question" in json.loads(file.readline())
        train = Source(path=str(chosen.data), columns=QUESTIONS if question else {})
    return Recipe(
        model=chosen.model,
        data=Data(train=train, overlong="drop"),
        train=Train(
            steps=WARM_UP + chosen.rounds,
            batch_size=chosen.batch,
            micro_batch_tokens=chosen.micro_batch_tokens,
        ),
        run=Path("unused"),
    )


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--data", type=Path, help="JSONL; default: the demo's rows")
    parser.add_argument("--batch", type=int, default=16, help="samples of a step")
    parser.add_argument("--micro-batch-tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=15, help=f"after {WARM_UP} of warm-up")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true", help="2 rounds of 4 samples")
    parser.add_argument("--out", type=Path, help=f"default: {RESULTS.name}; with --quick none")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.batch, chosen.micro_batch_tokens, chosen.rounds = 4, 512, 2
    elif chosen.out is None:
        chosen.out = RESULTS
    if chosen.rounds < 2:
        parser.error("--rounds: 2 or more, or there are no quartiles")
    return chosen


def main() -> None:
    """Measure, print the table, write the results."""
    chosen = parsed()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    recipe = recipe_of(chosen)
    setup = open_setup(recipe, Accelerator())
    load = os.getloadavg()[0]
    trainer = Trainer(recipe, setup.base, setup.device)
    with keeping_freed_memory():
        rounds = measure(trainer, setup.data.feed, chosen.rounds, chosen.micro_batch_tokens)
    variants = summaries(rounds)
    words = f"{chosen.batch} samples a step, {chosen.rounds} rounds, load average {load:.1f}"
    print(f"{words}\n\n{table(variants)}")
    if chosen.out is not None:
        settings = {
            key: getattr(chosen, key)
            for key in ("model", "batch", "micro_batch_tokens", "rounds", "threads")
        }
        content = {
            "settings": {**settings, "data": chosen.data and chosen.data.name, "warm_up": WARM_UP},
            "environment": environment(setup.device),
            "tokens_per_step": [each["tokens"] for each in rounds],
            "cases": [{"load_average_before": round(load, 2), "variants": variants}],
        }
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(chosen.out, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
