"""The training loop.

Every optimizer step takes `batch_size` samples, chosen by (seed, step) alone. Each process takes its share, in
micro-batches of similar lengths; losses are summed over tokens and divided once by the supervised tokens of the whole
step, which every process can count for itself. So neither the micro-batch size nor the number of processes changes
the gradient, and a resumed run meets the samples an uninterrupted one would.
"""

import json
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn

from qtune.data.chat import Sample
from qtune.data.collate import Batch, collate
from qtune.data.order import micro_batches, rows_of_step
from qtune.errors import UserError
from qtune.memory import Peak
from qtune.progress import Bar, bar
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

    Raises UserError, with the rows of the batch in bad_batch.json, when the loss is not finite.
    """
    settings = job.recipe.train
    optimizer = adamw(job.model.parameters(), settings)
    if job.start.step:
        _resume(job, optimizer, accelerator)
    model = accelerator.prepare(job.model)
    log = MetricsLog(job.folder, accelerator, job.start.step)
    now = job.start
    if not now.step:
        # a full disk is found here and not after hours
        _save(job, now, optimizer, accelerator)
    with bar("training", job.num_steps, done=now.step) as progress:
        for step in range(now.step, job.num_steps):
            now = _step(job, model, optimizer, accelerator, log, now, progress)
            if _due(settings.eval_every, now.step, job.num_steps):
                loss, tokens = held_out_loss(model, job.held_out, settings.micro_batch_tokens)
                log.write(now.step, {"held_out_loss": loss, "held_out_tokens": tokens})
            if _due(settings.save_every, now.step, job.num_steps):
                _save(job, now, optimizer, accelerator)
    return now


def held_out_loss(
    model: nn.Module, samples: Sequence[Sample], micro_batch_tokens: int
) -> tuple[float, int]:
    """Mean loss per supervised token, and how many there are; the same on every process."""
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for group in micro_batches(samples, micro_batch_tokens):
            loss, tokens = sft.loss(model, collate(group, _device(model)))
            total, count = total + float(loss), count + tokens
    model.train()
    return total / count, count


def _step(
    job: Job,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    log: MetricsLog,
    before: State,
    progress: Bar,
) -> State:
    """One optimizer step, its line in the log and its words in the bar."""
    started = time.perf_counter()
    settings = job.recipe.train
    rows = rows_of_step(len(job.samples), settings.batch_size, job.recipe.seed, before.step)
    samples = [job.samples[row] for row in rows]
    rate = learning_rate(before.step, job.num_steps, settings)
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = _accumulate(model, samples, settings.micro_batch_tokens, accelerator)
    _check_finite(loss, samples, job, before.step)
    norm = nn.utils.clip_grad_norm_(job.model.parameters(), settings.max_grad_norm or math.inf)
    optimizer.step()
    optimizer.zero_grad()
    seconds = time.perf_counter() - started
    tokens = sum(len(sample.ids) for sample in samples)
    after = replace(
        before,
        step=before.step + 1,
        tokens=before.tokens + tokens,
        supervised_tokens=before.supervised_tokens + _num_targets(samples),
        seconds=before.seconds + seconds,
    )
    peak = job.peak.bytes()
    if _due(job.recipe.log.every, after.step, job.num_steps):
        figures = {
            "loss": loss,
            "lr": rate,
            "grad_norm": float(norm),
            "tokens": after.tokens,
            "supervised_tokens": after.supervised_tokens,
            "tokens_per_s": tokens / seconds,
            "seconds": after.seconds,
            "peak_memory_bytes": peak,
        }
        log.write(after.step, figures)
    progress.advance(words=f"loss {loss:.4f} {tokens / seconds:.0f} tok/s {peak / 2**30:.1f} GiB")
    return after


def _accumulate(
    model: nn.Module, samples: list[Sample], max_tokens: int, accelerator: Accelerator
) -> float:
    """Gradients of the mean loss over the step's supervised tokens; that loss, the same on every process."""
    device, count = accelerator.device, _num_targets(samples)
    by_length = sorted(samples, key=lambda sample: -len(sample.ids))
    own = by_length[accelerator.process_index :: accelerator.num_processes]
    batches = [collate(group, device) for group in micro_batches(own, max_tokens)]
    total = torch.zeros((), device=device)
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1
        with nullcontext() if last else accelerator.no_sync(model):
            total += _backward(model, batch, accelerator.num_processes / count)
    return float(accelerator.reduce(total, "sum")) / count


def _backward(model: nn.Module, batch: Batch, scale: float) -> Tensor:
    """The batch's summed loss; its gradient is scaled, since processes average theirs."""
    loss, _ = sft.loss(model, batch)
    (loss * scale).backward()
    return loss.detach()


def _check_finite(loss: float, samples: list[Sample], job: Job, step: int) -> None:
    if math.isfinite(loss):
        return
    path = job.folder / "bad_batch.json"
    rows = [sample.row.place for sample in samples]
    path.write_text(json.dumps({"step": step + 1, "loss": str(loss), "rows": rows}, indent=1))
    raise UserError(
        f"step {step + 1}: the loss is {loss}; the rows of its batch are in {path}. "
        f"Look at them, lower train.lr, or resume from the last checkpoint with --resume"
    )


def _num_targets(samples: Sequence[Sample]) -> int:
    # the first token of a sample is predicted by nothing of its own
    return sum(sum(sample.supervised[1:]) for sample in samples)


def _due(every: int, step: int, num_steps: int) -> bool:
    return step == num_steps or (every > 0 and step % every == 0)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _save(job: Job, now: State, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> None:
    states = accelerator.gather(
        checkpoint.rng_state(accelerator.device).to(accelerator.device)[None]
    )
    if accelerator.is_main_process:
        rng = [row.cpu() for row in states]
        folder = job.folder / "checkpoints"
        checkpoint.save(folder, now, job.model, optimizer, rng, job.recipe.train.keep)
    accelerator.wait_for_everyone()


def _resume(job: Job, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> None:
    last = checkpoint.checkpoints(job.folder / "checkpoints")[-1]
    checkpoint.restore(last, job.model, optimizer)
    checkpoint.restore_rng(last, accelerator.process_index, accelerator.device)
