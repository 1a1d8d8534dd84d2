"""Part (c): tokens per second and peak memory of a training step, ours and the peers'.

A Llama 3 8B with eight of its 32 blocks and random weights trains rank 16 on all linear layers on
two samples of 4096 random tokens, all supervised: forward, backward, clipping, AdamW. Everything
recomputed is compared with everything recomputed, nothing with nothing; `cheap` is qtune's alone.
"""

import gc
import math
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from gpu.case import Case, Context, finite
from gpu.peers import PEERS, MeanLoss
from qtune.recipe import Train
from qtune.train.optim import make_optimizer
from qtune.train.recompute import Policy

# the fairest pairs first, in case time runs out
VARIANTS: tuple[tuple[str, Policy], ...] = (
    ("qtune", "all"),
    ("unsloth's calls", "all"),
    ("peft + bitsandbytes", "all"),
    ("qtune", "none"),
    ("unsloth's calls", "none"),
    ("qtune", "cheap"),
    ("peft + bitsandbytes", "none"),
)
SIZES = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
QUICK_SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
BATCH, LENGTH, QUICK_LENGTH = 2, 4096, 48
WARM_UP, STEPS, QUICK_STEPS = 3, 16, 2
TRAIN = Train(steps=1, lr=1e-3)


def cases(context: Context) -> list[Case]:
    """One case for each way to train and what it recomputes."""
    return [
        Case(f"{name}, recompute {policy}", partial(_measure, context, name, policy))
        for name, policy in VARIANTS
    ]


def _measure(context: Context, name: str, policy: Policy) -> dict[str, Any]:
    """Tokens per second, milliseconds, peak bytes, and the first and last loss."""
    _release(context)
    folder = _folder(context)
    torch.manual_seed(context.seed)
    length = QUICK_LENGTH if context.quick else LENGTH
    vocabulary = (QUICK_SIZES if context.quick else SIZES)["vocab_size"]
    ids = torch.randint(0, vocabulary, (BATCH, length)).to(context.device)
    model, mean_loss = PEERS[name](folder, ids, policy)
    seconds, losses = _train(context, model.train(), mean_loss)
    low, middle, high = quantiles(seconds, n=4)
    return {
        "variant": name,
        "recompute": policy,
        "tokens": ids.numel(),
        "tokens_per_s": ids.numel() / middle,
        "step_ms": {"median": middle * 1e3, "q1": low * 1e3, "q3": high * 1e3},
        "halves_ms": [median(half) * 1e3 for half in (seconds[::2], seconds[1::2])],
        "peak_bytes": torch.cuda.max_memory_allocated() if context.on_gpu else None,
        "first_loss": finite(losses[0]),
        "last_loss": finite(losses[-1]),
        # it must learn the one batch that it sees
        "ok": math.isfinite(losses[-1]) and losses[-1] < losses[0],
    }


def _train(
    context: Context, model: nn.Module, mean_loss: MeanLoss
) -> tuple[list[float], list[float]]:
    """Seconds of the steps after the warm-up, and the losses of all."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(model, TRAIN)
    seconds, losses = [], []
    for step in range(WARM_UP + (QUICK_STEPS if context.quick else STEPS)):
        if context.on_gpu and step == WARM_UP:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        loss = mean_loss()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        # waits for the GPU
        losses.append(float(loss.detach()))
        if context.on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[WARM_UP:], losses


def _folder(context: Context) -> Path:
    """The random model's folder, made by the first case and found by those behind it."""
    folder = Path(tempfile.gettempdir()) / "random-llama"
    if folder.exists():
        return folder
    torch.manual_seed(context.seed)
    config = LlamaConfig(
        **(QUICK_SIZES if context.quick else SIZES),
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    with context.device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}")
    model.save_pretrained(temporary)
    os.replace(temporary, folder)
    del model
    _release(context)
    return folder


def _release(context: Context) -> None:
    """Give back what the case before left, so that peaks are of one model."""
    gc.collect()
    if context.on_gpu:
        torch.cuda.empty_cache()
