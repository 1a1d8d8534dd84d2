"""Tokens per second of one QLoRA step on the CPU: qtune's, and those of transformers with PEFT.

    python benchmarks/cpu_step.py --threads 1 2

Trains rank 16 on all linear layers with 4 x 512 tokens of text, all supervised, with no dropout and
no recomputation; `step_variants.py` says what the variants are. Each has a process of its own,
because two models in one would share an allocator. First they step in turn, one while the others
wait, so that other load on the machine hits all of them alike; then each has the machine to itself,
one after the other, which is kinder to those that allocate much. Ratios are of steps of the same
round. Losses must agree, so that no broken model is timed. Prints tables and writes
benchmarks/results/cpu_step.json.
"""

import argparse
import json
import multiprocessing
import os
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from step_variants import VARIANTS, Task, serve

from qtune.files import write_text
from qtune.model.sources import resolve

RESULTS = Path(__file__).parent / "results/cpu_step.json"
# text that every checkout has and that hardly ever changes
TEXT = Path(__file__).parents[1] / "LICENSE"
BASELINE = "peft bf16"
WARM_UP = 2
# of a first loss, relative: NF4 costs a model of 135M parameters 15 %, other code next to nothing
MOST_QUANTIZATION = 0.3
MOST_DIFFERENCE = 0.03

Steps = dict[str, list[tuple[float, float]]]
"""(seconds, loss) of every step, by variant."""


class Worker:
    """A variant in its own process."""

    def __init__(self, name: str, task: Task) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe: Connection
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=serve, args=(name, task, other), daemon=True)
        self._process.start()
        # so that a process that dies ends the pipe
        other.close()

    def environment(self) -> dict[str, Any]:
        """What it runs on, once its model is loaded; EOFError where that failed."""
        facts: dict[str, Any] = self._pipe.recv()
        return facts

    def step(self) -> tuple[float, float]:
        """Seconds of one step, and the loss before it; EOFError where it failed."""
        self._pipe.send("step")
        seconds, loss = self._pipe.recv()
        return seconds, loss

    def end(self) -> None:
        """Close the pipe, which ends the process, and stop one that is busy all the same."""
        self._pipe.close()
        self._process.join(timeout=10)
        self._process.terminate()
        self._process.join()


@contextmanager
def workers(task: Task, names: Sequence[str]) -> Iterator[tuple[dict[str, Worker], dict[str, Any]]]:
    """A ready worker for each of the variants, and what they run on."""
    # torch reads it once, when it is imported there
    os.environ["OMP_NUM_THREADS"] = str(task.threads)
    made: dict[str, Worker] = {}
    try:
        for name in names:
            made[name] = Worker(name, task)
        # none steps before all are loaded
        facts = [worker.environment() for worker in made.values()]
        yield made, facts[0]
    finally:
        for worker in made.values():
            worker.end()


def measure(made: dict[str, Worker], rounds: int) -> Steps:
    """Every step after and including the warm-up; each round begins with another variant."""
    names = list(made)
    steps: Steps = {name: [] for name in names}
    for i in range(WARM_UP + rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            steps[name].append(made[name].step())
    return steps


def check_losses(steps: Steps) -> None:
    """ValueError unless first losses agree and every variant learned."""
    first = {name: losses[0][1] for name, losses in steps.items()}
    quantized = [loss for name, loss in first.items() if name != BASELINE]
    plain = first[BASELINE]
    if not max(quantized) - min(quantized) <= MOST_DIFFERENCE * plain:
        raise ValueError(f"the quantized models differ in their first loss: {first}")
    if not all(abs(loss - plain) <= MOST_QUANTIZATION * plain for loss in quantized):
        raise ValueError(f"first losses are far from that of {BASELINE}: {first}")
    for name, losses in steps.items():
        if not losses[-1][1] < losses[0][1]:
            raise ValueError(f"{name} does not learn: loss {losses[0][1]}, then {losses[-1][1]}")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "q1": low, "q3": high}


def summaries(steps: Steps, num_tokens: int) -> dict[str, dict[str, Any]]:
    """By variant: tokens per second, their ratio to the baseline's, losses, and every round."""
    seconds = {name: [s for s, _ in own[WARM_UP:]] for name, own in steps.items()}
    found = {}
    for name, own in seconds.items():
        pairs = zip(seconds[BASELINE], own, strict=True)
        found[name] = {
            "tokens_per_s": spread([num_tokens / s for s in own]),
            "ratio": spread([baseline / s for baseline, s in pairs]),
            "first_loss": steps[name][0][1],
            "last_loss": steps[name][-1][1],
            "step_s": own,
        }
    return found


def run(task: Task, rounds: int, *, alone: bool) -> dict[str, Any]:
    """The results for one number of threads, after printing its table."""
    load = os.getloadavg()[0]
    steps: Steps = {}
    for names in [[name] for name in VARIANTS] if alone else [list(VARIANTS)]:
        with workers(task, names) as (made, facts):
            steps |= measure(made, rounds)
    check_losses(steps)
    variants = summaries(steps, task.batch * task.length)
    words = f"{task.threads} threads, {task.batch} x {task.length} tokens, {rounds} rounds"
    words += ", one variant after the other" if alone else ", all variants in turn"
    print(f"{facts['processor']}, {words}, load average {load:.1f}\n\n{table(variants)}\n")
    return {
        "threads": task.threads,
        "alone": alone,
        "load_average_before": load,
        "environment": facts,
        "variants": variants,
    }


def table(variants: dict[str, dict[str, Any]]) -> str:
    """Medians with quartiles, one variant a line."""
    lines = [f"| variant | tokens/s | ratio to {BASELINE} | loss |", "| --- | --- | --- | --- |"]
    for name, found in variants.items():
        speed, ratio = found["tokens_per_s"], found["ratio"]
        cells = (
            name,
            f"{speed['median']:.0f} ({speed['q1']:.0f}-{speed['q3']:.0f})",
            f"{ratio['median']:.2f}x ({ratio['q1']:.2f}-{ratio['q3']:.2f})",
            f"{found['first_loss']:.3f} -> {found['last_loss']:.3f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--text", type=Path, default=TEXT, help="a file to train on")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--rounds", type=int, default=7, help=f"after {WARM_UP} of warm-up")
    parser.add_argument("--threads", type=int, nargs="+", default=[os.cpu_count()])
    parser.add_argument("--quick", action="store_true", help="2 rounds in turn of 1 x 128 tokens")
    parser.add_argument("--out", type=Path, help=f"default: {RESULTS.name}; with --quick none")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.batch, chosen.length, chosen.rounds = 1, 128, 2
    elif chosen.out is None:
        chosen.out = RESULTS
    if chosen.rounds < 2:
        parser.error("--rounds: 2 or more, or there are no quartiles")
    return chosen


def main() -> None:
    """Measure for every number of threads, print the tables, write the results."""
    chosen = parsed()
    task = Task(resolve(chosen.model), chosen.text, chosen.batch, chosen.length, threads=1)
    cases = [
        run(replace(task, threads=n), chosen.rounds, alone=alone)
        for n in chosen.threads
        for alone in ((False,) if chosen.quick else (False, True))
    ]
    if chosen.out is not None:
        settings = {**vars(chosen), "text": chosen.text.name, "warm_up": WARM_UP}
        del settings["out"], settings["quick"], settings["threads"]
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(chosen.out, json.dumps({"settings": settings, "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
