"""The training loop.

Every optimizer step takes `batch_size` samples, chosen by (seed, step) alone. Each process takes
its share, in micro-batches of similar lengths; losses are summed over tokens and divided once by
the supervised tokens of the whole step, which every process can count for itself. So neither the
micro-batch size nor the number of processes changes the gradient, and a resumed run meets the
samples an uninterrupted one would.
"""

import json
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import nn

from qtune.data.chat import Sample
from qtune.data.collate import ROW_MULTIPLE, collate
from qtune.data.order import micro_batches, rows_of_step, share
from qtune.errors import UserError
from qtune.machine import Peak
from qtune.progress import bar
from qtune.recipe import Recipe
from qtune.train import state as checkpoint
from qtune.train.log import MetricsLog
from qtune.train.objectives import sft
from qtune.train.optim import adamw, learning_rate
from qtune.train.state import State


@dataclass(frozen=True)
class Job:
    """A training run: what is trained on what, and where it is written."""

    recipe: Recipe
    model: PeftModel
    samples: Sequence[Sample]
    held_out: Sequence[Sample]
    num_steps: int
    folder: Path
    start: State
    """Where training begins: step 0, or what a checkpoint says."""
    peak: Peak


def train(job: Job, accelerator: Accelerator) -> State:
    """Train the adapter in place from `job.start` to the last step; the state it ends in.

    Raises UserError, with the rows of the batch in bad_batch.json, when a loss or its gradient is
    not finite.
    """
    return _Training(job, accelerator).to_the_end()


def held_out_loss(
    model: nn.Module, samples: Sequence[Sample], micro_batch_tokens: int
) -> tuple[float, int]:
    """Mean loss per supervised token, and how many there are; the same on every process."""
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for group in micro_batches(samples, micro_batch_tokens):
            loss, tokens = sft.loss(model, collate(group, _device(model), multiple=ROW_MULTIPLE))
            total, count = total + float(loss), count + tokens
    model.train()
    return total / count, count


class _Training:
    """A job under way: its optimizer, its log, and the model as the processes share it."""

    def __init__(self, job: Job, accelerator: Accelerator) -> None:
        self._job, self._accelerator = job, accelerator
        self._settings = job.recipe.train
        self._checkpoints = job.folder / "checkpoints"
        self._trained = [p for p in job.model.parameters() if p.requires_grad]
        self._optimizer = adamw(self._trained, self._settings)
        if job.start.step:
            self._restore()
        else:
            # adapters start the same in all processes, dropout must not
            torch.manual_seed(job.recipe.seed + accelerator.process_index)
        # loading leaves a model in evaluation mode, where gradient checkpointing is off
        self._model = accelerator.prepare(job.model).train()
        self._log = MetricsLog(job.folder, accelerator, job.start.step)

    def to_the_end(self) -> State:
        now, end = self._job.start, self._job.num_steps
        if not now.step:
            # a full disk is found here and not after hours
            self._save(now)
        with bar("training", end, done=now.step) as progress:
            while now.step < end:
                now, words = self._step(now)
                progress.advance(words=words)
                if _due(self._settings.eval_every, now.step, end):
                    self._evaluate(now)
                if _due(self._settings.save_every, now.step, end):
                    self._save(now)
        return now

    def _step(self, now: State) -> tuple[State, str]:
        """One optimizer step: the state after it, and a few words on how it went."""
        started = time.perf_counter()
        samples = self._samples(now.step)
        rate = learning_rate(now.step, self._job.num_steps, self._settings)
        loss = self._accumulate(samples)
        norm = self._update(rate, loss, samples, now.step + 1)
        seconds = time.perf_counter() - started
        tokens = sum(len(sample.ids) for sample in samples)
        after = replace(
            now,
            step=now.step + 1,
            tokens=now.tokens + tokens,
            supervised_tokens=now.supervised_tokens + _num_targets(samples),
            seconds=now.seconds + seconds,
        )
        speed, peak = tokens / seconds, self._job.peak.bytes()
        if _due(self._job.recipe.log.every, after.step, self._job.num_steps):
            self._log.write(after.step, _figures(after, loss, rate, norm, speed, peak))
        return after, f"loss {loss:.4f} {speed:.0f} tok/s {peak / 2**30:.1f} GiB"

    def _samples(self, step: int) -> list[Sample]:
        samples, recipe = self._job.samples, self._job.recipe
        rows = rows_of_step(len(samples), recipe.train.batch_size, recipe.seed, step)
        return [samples[row] for row in rows]

    def _accumulate(self, samples: list[Sample]) -> float:
        """Gradients of the step's mean loss per supervised token; that loss, of all processes."""
        accelerator, count = self._accelerator, _num_targets(samples)
        own = share(samples, accelerator.process_index, accelerator.num_processes)
        groups = micro_batches(own, self._settings.micro_batch_tokens)
        total = torch.zeros((), device=accelerator.device)
        for i, group in enumerate(groups):
            last = i == len(groups) - 1
            with nullcontext() if last else accelerator.no_sync(self._model):
                loss, _ = sft.loss(
                    self._model, collate(group, accelerator.device, multiple=ROW_MULTIPLE)
                )
                # processes average their gradients
                (loss * (accelerator.num_processes / count)).backward()
            total += loss.detach()
        return float(accelerator.reduce(total, "sum")) / count

    def _update(self, rate: float, loss: float, samples: list[Sample], step: int) -> float:
        """Clip the gradients and let the optimizer step; the norm they had."""
        limit = self._settings.max_grad_norm or math.inf
        norm = float(nn.utils.clip_grad_norm_(self._trained, limit))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._refuse(step, samples, loss, norm)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def _refuse(self, step: int, samples: list[Sample], loss: float, norm: float) -> NoReturn:
        """Raise about a step that would spoil the adapter; its rows go to bad_batch.json."""
        path = self._job.folder / "bad_batch.json"
        if self._accelerator.is_main_process:
            rows = [sample.row.place for sample in samples]
            facts = {"step": step, "loss": str(loss), "grad_norm": str(norm), "rows": rows}
            path.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
        raise UserError(
            f"step {step}: the loss is {loss} and the norm of its gradient {norm}; the rows of "
            f"the batch are in {path}: look at them, or start again with a lower train.lr"
        )

    def _evaluate(self, now: State) -> None:
        loss, tokens = held_out_loss(
            self._model, self._job.held_out, self._settings.micro_batch_tokens
        )
        self._log.write(now.step, {"held_out_loss": loss, "held_out_tokens": tokens})

    def _save(self, now: State) -> None:
        accelerator = self._accelerator
        own = checkpoint.rng_state(accelerator.device).to(accelerator.device)
        rng = [state.cpu() for state in accelerator.gather(own[None])]
        if accelerator.is_main_process:
            checkpoint.save(
                self._checkpoints, now, self._job.model, self._optimizer, rng, self._settings.keep
            )
        accelerator.wait_for_everyone()

    def _restore(self) -> None:
        last = checkpoint.checkpoints(self._checkpoints)[-1]
        checkpoint.restore(last, self._job.model, self._optimizer)
        checkpoint.restore_rng(last, self._accelerator.process_index, self._accelerator.device)


def _figures(
    state: State, loss: float, rate: float, norm: float, speed: float, peak: int
) -> dict[str, float]:
    """A step's line in metrics.jsonl."""
    return {
        "loss": loss,
        "lr": rate,
        "grad_norm": norm,
        "tokens": state.tokens,
        "supervised_tokens": state.supervised_tokens,
        "tokens_per_s": speed,
        "seconds": state.seconds,
        "peak_memory_bytes": peak,
    }


def _num_targets(samples: Sequence[Sample]) -> int:
    # the first token of a sample is predicted by nothing of its own
    return sum(sum(sample.supervised[1:]) for sample in samples)


def _due(every: int, step: int, num_steps: int) -> bool:
    return step == num_steps or (every > 0 and step % every == 0)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
