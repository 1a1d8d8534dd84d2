"""What `cpu_step.py` compares: one way to train an adapter each, served by a process of its own.

Every variant makes the same step with the code its own users would run: forward, mean loss per
supervised token, backward, clipping, AdamW over the adapter. The peers run in bf16 throughout, the
faster of what PEFT's users do; `prepared` is what PEFT documents for quantized models, which casts
norms, embeddings and head to float32, under the autocast that Trainer's `bf16` switches on.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import logging

from qtune.data.collate import ROW_MULTIPLE, collate
from qtune.data.sample import Sample
from qtune.environment import environment
from qtune.machine import keeping_freed_memory
from qtune.model.forward import check_packing
from qtune.model.load import add_adapter, load_base, load_tokenizer
from qtune.recipe import Lora, Quant, Train
from qtune.train.objective import load_objective
from qtune.train.optim import make_optimizer

CPU = torch.device("cpu")
LORA = Lora()
TRAIN = Train(steps=1)

MeanLoss = Callable[[], Tensor]
Variant = Callable[[Path, Tensor], tuple[nn.Module, MeanLoss]]


@dataclass(frozen=True)
class Task:
    """What is trained on what: `batch` pieces of `length` tokens from the start of a text."""

    model: Path
    text: Path
    batch: int
    length: int
    threads: int


def qtune_nf4(folder: Path, ids: Tensor) -> tuple[nn.Module, MeanLoss]:
    """The model as `qtune train` makes it, and the loss that its loop takes of a micro-batch."""
    base = load_base(folder, Quant(format="nf4"), device=CPU)
    check_packing(base)
    model = add_adapter(base, LORA)
    rows = enumerate(ids.tolist())
    samples = [Sample(f"text:{i}", row, [0.0] + [1.0] * (len(row) - 1)) for i, row in rows]
    batch = collate(samples, multiple=ROW_MULTIPLE)
    objective = load_objective(TRAIN)
    num_targets = objective.count(samples)

    def mean_loss() -> Tensor:
        total, _ = objective.loss(model, batch, None)
        return total / num_targets

    return model, mean_loss


def peft_bf16(folder: Path, ids: Tensor) -> tuple[nn.Module, MeanLoss]:
    """LoRA by PEFT on the base in bf16, with the loss that transformers computes from labels."""
    return _with_peft(_transformers_model(folder), ids)


def peft_bitsandbytes(folder: Path, ids: Tensor) -> tuple[nn.Module, MeanLoss]:
    """The same on bitsandbytes' NF4 with double quantization."""
    return _with_peft(_bitsandbytes_model(folder), ids)


def peft_bitsandbytes_prepared(folder: Path, ids: Tensor) -> tuple[nn.Module, MeanLoss]:
    """The same after `prepare_model_for_kbit_training`, under bf16 autocast."""
    base = prepare_model_for_kbit_training(
        _bitsandbytes_model(folder), use_gradient_checkpointing=False
    )
    return _with_peft(base, ids, autocast=True)


VARIANTS: dict[str, Variant] = {
    "peft bf16": peft_bf16,
    "qtune nf4": qtune_nf4,
    "peft bitsandbytes nf4": peft_bitsandbytes,
    "peft bitsandbytes nf4 prepared": peft_bitsandbytes_prepared,
}


def serve(name: str, task: Task, parent: Connection) -> None:
    """Build the variant, send its environment, then a step's (seconds, loss) for every message.

    Returns when the other end of the pipe is closed.
    """
    torch.set_num_threads(task.threads)
    logging.disable_progress_bar()
    torch.manual_seed(0)
    model, mean_loss = VARIANTS[name](task.model, token_ids(task))
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(model, TRAIN)
    parent.send(environment(CPU))
    # as `qtune train` does; the peers' programs leave the allocator alone
    with keeping_freed_memory() if name.startswith("qtune") else nullcontext():
        while _is_asked(parent):
            start = time.perf_counter()
            loss = step(mean_loss, trained, optimizer)
            parent.send((time.perf_counter() - start, loss))


def step(
    mean_loss: MeanLoss, trained: list[nn.Parameter], optimizer: torch.optim.Optimizer
) -> float:
    """One optimizer step, as in `qtune.train.loop`; the loss before it."""
    loss = mean_loss()
    loss.backward()
    assert TRAIN.max_grad_norm is not None
    nn.utils.clip_grad_norm_(trained, TRAIN.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def token_ids(task: Task) -> Tensor:
    """The text's first tokens, int64 [batch, length]; ValueError where it is too short."""
    ids = load_tokenizer(task.model)(task.text.read_text("utf-8"))["input_ids"]
    needed = task.batch * task.length
    if len(ids) < needed:
        raise ValueError(f"{task.text} has {len(ids)} tokens, {needed} are needed")
    return torch.tensor(ids[:needed]).view(task.batch, task.length)


def _is_asked(parent: Connection) -> bool:
    """Waits for a message; whether there was one."""
    try:
        parent.recv()
    except EOFError:
        return False
    return True


def _transformers_model(folder: Path, **how: Any) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": CPU}, attn_implementation="sdpa", **how
    )
    model.config.use_cache = False
    return model


def _bitsandbytes_model(folder: Path) -> PreTrainedModel:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return _transformers_model(folder, quantization_config=config)


def _with_peft(
    base: PreTrainedModel, ids: Tensor, *, autocast: bool = False
) -> tuple[nn.Module, MeanLoss]:
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=LORA.rank,
        lora_alpha=LORA.alpha,  # type: ignore[arg-type]
        target_modules="all-linear",
    )
    model = get_peft_model(base, config)

    def mean_loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            loss: Tensor = model(input_ids=ids, labels=ids).loss
        return loss

    return model, mean_loss
