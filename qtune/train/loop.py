"""The training loop.

Every optimizer step takes `batch_size` samples, chosen by the feed. Each process takes its share,
in micro-batches; losses are summed and divided once by what the objective counts in the whole step
(`train/step.py`). So neither the micro-batch size nor the number of processes changes the gradient,
and a resumed run meets the samples an uninterrupted one would.

A run that is asked to stop ends its step, saves and leaves. What was due behind that step (held-out
loss, samples) is done first when it goes on, so nothing is missing from its figures.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from accelerate import Accelerator
from peft import PeftModel
from torch import nn

from qtune.data.feed import Feed
from qtune.data.sample import Sample
from qtune.errors import UserError
from qtune.files import write_text
from qtune.interrupt import Stop, listening
from qtune.machine import Peak
from qtune.progress import bar
from qtune.recipe import Recipe
from qtune.train import parallel
from qtune.train.keeper import Keeper
from qtune.train.log import MetricsLog
from qtune.train.merging import Merging
from qtune.train.objective import Objective
from qtune.train.optim import make_optimizer
from qtune.train.schedule import learning_rate
from qtune.train.speed import Meter
from qtune.train.state import State
from qtune.train.step import Passes
from qtune.train.tensors import trained_parameters
from qtune.train.watch import Watch


@dataclass(frozen=True)
class Job:
    """A training run: what is trained on what, and where it is written."""

    recipe: Recipe
    model: PeftModel
    objective: Objective
    feed: Feed
    held_out: Sequence[Sample]
    num_steps: int
    folder: Path
    start: State
    """Where training begins: step 0, or what a checkpoint says."""
    peak: Peak
    matrix_flops_per_s: float | None = None
    """What a device reaches in matrix products, to tell training's share of it."""
    answer: Callable[[nn.Module], list[dict[str, Any]]] | None = None
    """Answers to a few test rows, for the log; needed where the recipe asks for samples."""


def train(job: Job, accelerator: Accelerator) -> State:
    """Train the adapter in place from `job.start` to the end; the state it ends in.

    What the model holds then is what the recipe keeps: the last adapter, the average, or the one of
    the lowest held-out loss. Raises UserError, with the rows of the batch in bad_batch.json, when a
    loss or its gradient is not finite, and Interrupted, behind a checkpoint, when the run is asked
    to stop.
    """
    return _Training(job, accelerator).to_the_end()


class _Training:
    """A job under way: its optimizer, its log, and the model as the processes share it."""

    def __init__(self, job: Job, accelerator: Accelerator) -> None:
        self._job, self._accelerator = job, accelerator
        self._settings = job.recipe.train
        model = parallel.distribute(job.model, accelerator, self._settings.parallel)
        # loading leaves a model in evaluation mode, where gradient checkpointing is off
        self._model = model.train()
        self._optimizer = make_optimizer(job.model, self._settings, job.recipe.scales.lr)
        self._trained = list(trained_parameters(job.model).values())
        self._passes = Passes(job.model, model, job.objective, job.recipe, accelerator)
        folder = job.folder / "checkpoints"
        self._keeper = Keeper(folder, job.model, self._optimizer, job.recipe, accelerator)
        self._keeper.restore(job.start)
        self._merging = Merging(job.model, self._settings, job.num_steps)
        self._watch = Watch(self._settings, job.start.watch)
        if job.start.step:
            job.feed.restore(job.start.feed)
        self._meter = Meter(job.model, job.matrix_flops_per_s, accelerator.num_processes)
        self._log = MetricsLog(job.folder, accelerator, job.start.step, job.start.looked)

    def to_the_end(self) -> State:
        now, end = self._job.start, self._job.num_steps
        with listening() as stop, bar("training", end, done=now.step) as progress:
            if not now.step:
                # a full disk is found here and not after hours
                self._keeper.save(now)
            now = self._look(now)
            while now.step < end and not now.stopped:
                now, words, stops = self._step(now, stop)
                progress.advance(words=words)
                if any(stops):
                    self._keeper.save(now)
                    stop.raise_if(stops)
                now = self._look(now)
                if now.stopped or _due(self._settings.save_every, now.step, end):
                    self._keeper.save(now)
        self._keeper.put_kept()
        self._merging.finish()
        return now

    def _step(self, now: State, stop: Stop) -> tuple[State, str, list[float]]:
        """One optimizer step: the state after it, words on how it went, flags of all processes.

        A gradient that is a spike is left out: the adapter stays as it is, and the step counts.
        """
        self._meter.start()
        with self._meter.waiting():
            samples = self._job.feed.batch(now.step)
        self._merging.begin(now.step)
        rate = learning_rate(now.step, self._job.num_steps, self._settings)
        means = self._passes.learn(samples, lambda: stop.flags)
        norm = parallel.clip_grad_norm(self._trained, self._settings.max_grad_norm or math.inf)
        if not (math.isfinite(means.loss) and math.isfinite(norm)):
            self._refuse(now.step + 1, samples, means.loss, norm)
        if not self._watch.is_spike(norm):
            self._update(rate)
        self._optimizer.zero_grad()
        after, speed = self._counted(now, samples)
        figures = {"loss": means.loss, "lr": rate, "grad_norm": norm, **means.figures, **speed}
        if _due(self._job.recipe.log.every, after.step, self._job.num_steps):
            self._log.write(after.step, figures)
        return after, _words(figures), means.flags

    def _update(self, rate: float) -> None:
        """Let the optimizer step at this learning rate, times the scale of each group."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        self._optimizer.step()
        self._keeper.stepped()

    def _counted(self, now: State, samples: Sequence[Sample]) -> tuple[State, dict[str, float]]:
        """The state after a step on these samples, and what its line says of amounts and speed."""
        tokens = sum(sample.num_tokens for sample in samples)
        targets = sum(sample.num_targets for sample in samples)
        speed = self._meter.finish(tokens, targets)
        after = replace(
            now,
            step=now.step + 1,
            tokens=now.tokens + tokens,
            supervised_tokens=now.supervised_tokens + targets,
            seconds=now.seconds + tokens / speed["tokens_per_s"],
            feed=self._job.feed.state(),
            watch=self._watch.state(),
        )
        totals = {key: getattr(after, key) for key in ("tokens", "supervised_tokens", "seconds")}
        peak = {"peak_memory_bytes": self._job.peak.bytes()}
        spikes = {"num_spikes": self._watch.num_spikes} if self._settings.spike_factor else {}
        return after, {**totals, **speed, **peak, **spikes}

    def _refuse(self, step: int, samples: Sequence[Sample], loss: float, norm: float) -> NoReturn:
        """Raise about a step that would spoil the adapter; its rows go to bad_batch.json."""
        path = self._job.folder / "bad_batch.json"
        if self._accelerator.is_main_process:
            rows = [sample.place for sample in samples]
            facts = {"step": step, "loss": str(loss), "grad_norm": str(norm), "rows": rows}
            write_text(path, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
        raise UserError(
            f"step {step}: the loss is {loss} and the norm of its gradient {norm}; the rows of "
            f"the batch are in {path}: look at them, or start again with a lower train.lr"
        )

    def _look(self, now: State) -> State:
        """What is due behind a step and changes no weight: held-out loss, samples."""
        if now.looked == now.step:
            return now
        stopped, end = False, self._job.num_steps
        if self._job.held_out and _due(self._settings.eval_every, now.step, end):
            stopped = self._evaluate(now.step)
        if self._settings.sample_every and _due(self._settings.sample_every, now.step, end):
            self._sample(now.step)
        return replace(now, looked=now.step, stopped=stopped, watch=self._watch.state())

    def _evaluate(self, step: int) -> bool:
        """Measure the held-out loss; whether patience is at its end."""
        with self._keeper.measured(), self._merging.measured():
            means = self._passes.measure(self._job.held_out)
        tokens = sum(sample.num_targets for sample in self._job.held_out)
        figures = {"loss": means.loss, **means.figures, "tokens": tokens}
        self._log.write(step, {f"held_out_{name}": value for name, value in figures.items()})
        verdict = self._watch.evaluated(step, means.loss)
        if verdict.best:
            self._keeper.keep_best()
        return verdict.stop

    def _sample(self, step: int) -> None:
        """Answer a few test rows and log that."""
        assert self._job.answer is not None
        with self._keeper.measured(), self._merging.measured():
            answers = self._job.answer(self._job.model)
        parallel.settle(self._job.model)
        self._log.write_samples(step, answers)


def _words(figures: dict[str, Any]) -> str:
    """What the bar says of a step."""
    return (
        f"loss {figures['loss']:.4f} {figures['tokens_per_s']:.0f} tok/s "
        f"{figures['peak_memory_bytes'] / 2**30:.1f} GiB, {figures['data_wait_share']:.0%} waiting"
    )


def _due(every: int, step: int, num_steps: int) -> bool:
    return step == num_steps or (every > 0 and step % every == 0)
