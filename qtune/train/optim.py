"""Optimizers by the names that recipes use, and what each of them needs.

- adamw (arXiv 1711.05101) is PyTorch's, in one pass over each matrix.
- adamw_8bit, paged_adamw, paged_adamw_8bit are bitsandbytes': moments in 8 bits (arXiv 2110.02861),
  in memory that moves to the host when the GPU is full, or both.
- adafactor (arXiv 1804.04235) is transformers'. PyTorch's own multiplies each step with the size of
  the matrix and has no switch for it: B of a fresh adapter is zero and would hardly move. Here the
  learning rate is AdamW's.
- lion and muon: see there.

On the CPU the 8-bit one runs too; bitsandbytes has no paging there and would keep ordinary moments.
A step is the same whatever the number of processes. AdamW and Lion take each entry by itself and so
run on sharded matrices; the others need the whole of one.

Matrices decay, vectors do not. LoRA+ (arXiv 2402.12354) multiplies the learning rate of B matrices;
trained scales have a rate of their own.
A group's "scale" is what the schedule's rate is multiplied with for it.
"""

import math
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import Adafactor

from qtune.errors import UserError
from qtune.model.scales import NAME as SCALES
from qtune.recipe import Train
from qtune.train.lion import Lion
from qtune.train.muon import MuonWithAdamW

PAGED = ("paged_adamw", "paged_adamw_8bit")
BITSANDBYTES = ("adamw_8bit", *PAGED)
# entries of a scale's block, and the fewest in a matrix whose moments are packed, or paged
BLOCK, LEAST_PACKED, LEAST_PAGED = 256, 4096, 100_000
# moment decay rates where the recipe names none
ADAM_BETAS = (0.9, 0.999)
BETAS = {"lion": (0.9, 0.99), "muon": (0.95, 0.999)}
# they need a whole matrix at a time, or its blocks
NOT_SHARDED = ("adafactor", "muon", *BITSANDBYTES)


def make_optimizer(
    model: nn.Module, settings: Train, scales_lr: float | None = None
) -> torch.optim.Optimizer:
    """The recipe's optimizer over what is trained in the model; every group has a "scale".

    `scales_lr` is the learning rate of trained scales, by default that of all else.
    """
    groups = parameter_groups(model.named_parameters(), settings, scales_lr)
    lr, betas = settings.lr, settings.betas or BETAS.get(settings.optimizer, ADAM_BETAS)
    match settings.optimizer:
        case "adamw":
            return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)
        case "adafactor":
            return Adafactor(groups, lr=lr, scale_parameter=False, relative_step=False)
        case "lion":
            return Lion(groups, lr, betas)
        case "muon":
            return MuonWithAdamW(groups, lr, betas)
        case name:
            return _bitsandbytes(name, groups, lr, betas)


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    settings: Train,
    scales_lr: float | None = None,
) -> list[dict[str, Any]]:
    """The trained parameters by weight decay and scale of the learning rate."""
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        if parameter.requires_grad:
            decay = settings.weight_decay if parameter.ndim > 1 else 0.0
            scale = _rate_scale(name, settings, scales_lr)
            found.setdefault((decay, scale), []).append(parameter)
    return [
        {"params": group, "weight_decay": decay, "scale": scale, "lr": settings.lr * scale}
        for (decay, scale), group in found.items()
    ]


def _rate_scale(name: str, settings: Train, scales_lr: float | None) -> float:
    """What the schedule's learning rate is multiplied with for the parameter of that name."""
    if f".{SCALES}." in name:
        return 1.0 if scales_lr is None else scales_lr / settings.lr
    return settings.lora_plus_ratio if _is_b(name) else 1.0


def _is_b(name: str) -> bool:
    return "lora_B" in name or "lora_embedding_B" in name


def _bitsandbytes(
    name: str, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    # takes a second, and only runs that use it pay
    from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW, PagedAdamW8bit

    kinds = {
        "adamw_8bit": AdamW8bit,
        "paged_adamw": PagedAdamW,
        "paged_adamw_8bit": PagedAdamW8bit,
    }
    optimizer: torch.optim.Optimizer = kinds[name](groups, lr=lr, betas=betas)
    return optimizer


def check(settings: Train, device: torch.device) -> None:
    """Raises UserError where the recipe's optimizer cannot run: package, device, sharding."""
    name = settings.optimizer
    where = f"train.optimizer: {name}"
    if name in BITSANDBYTES and find_spec("bitsandbytes") is None:
        raise UserError(f"{where} needs bitsandbytes: pip install 'qtune[bitsandbytes]'")
    if name in PAGED and device.type != "cuda":
        raise UserError(
            f"{where} moves memory between GPU and host, and there is no GPU here; "
            f"write {'adamw_8bit' if name.endswith('8bit') else 'adamw'}"
        )
    if name in NOT_SHARDED and settings.parallel == "fsdp":
        raise UserError(
            f"{where} takes whole matrices, which train.parallel: fsdp shards; "
            f"write adamw or lion, or train.parallel: ddp"
        )


def state_bytes(model: nn.Module, settings: Train) -> int:
    """Bytes that the optimizer and the moving average keep on the device; shapes are enough.

    Paged moments of large matrices are not counted: they leave the device when it is full.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    average = 4 * sum(p.numel() for p in trained) if settings.ema_decay is not None else 0
    return average + sum(_moment_bytes(p, settings.optimizer) for p in trained)


def _moment_bytes(parameter: nn.Parameter, optimizer: str) -> int:
    n, size = parameter.numel(), parameter.nbytes
    match optimizer:
        case "lion":
            return size
        case "muon" if parameter.ndim == 2:
            return size
        case "adafactor":
            rows, columns = parameter.shape[:-1].numel(), n // parameter.shape[-2:][0]
            return 4 * (rows + columns) if parameter.ndim > 1 else 4 * n
        case "adamw_8bit" | "paged_adamw" | "paged_adamw_8bit":
            return _bitsandbytes_bytes(n, optimizer)
        case _:
            return 2 * size


def _bitsandbytes_bytes(n: int, optimizer: str) -> int:
    """Two moments of n entries, as codes with a scale per block where there are enough of them."""
    packed = optimizer != "paged_adamw" and n >= LEAST_PACKED
    moment = n if packed else 4 * n
    if optimizer in PAGED and n >= LEAST_PAGED:
        moment = 0
    return 2 * (moment + (4 * math.ceil(n / BLOCK) if packed else 0))
