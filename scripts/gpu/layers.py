"""Whole layers, forward and backward, beside their peers: with LoRA (K7) and in 8 bits (K8)."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from gpu import timing, unsloth_calls
from gpu.case import Case, Context, finite
from qtune.model import lora
from qtune.quant.linear import QuantLinear
from qtune.quant.storage import Storage
from qtune_kernels.linear_int8 import THRESHOLD, linear_int8

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
LORA_ROWS, INT8_ROWS = 8192, 4096
QUICK_SHAPES, QUICK_ROWS = ((128, 64),), 4
RANK, ALPHA = 16, 32
RUNS, QUICK_RUNS = 50, 2
# of the outputs, relative to a dense layer in bf16
MOST_ERROR = {"K7": 0.15, "K8": 0.05}


def cases(context: Context) -> list[Case]:
    """One case for each kind and shape."""
    shapes = QUICK_SHAPES if context.quick else SHAPES
    return [
        Case(f"{kind} {shape[0]}x{shape[1]}", partial(measure, context, goal, shape))
        for goal, kind in (("K7", "LoRA layer"), ("K8", "INT8 layer"))
        for shape in shapes
    ]


def measure(context: Context, goal: str, shape: tuple[int, int]) -> dict[str, Any]:
    """The times of one layer's variants; `ok`: their outputs are those of the dense layer."""
    rows = QUICK_ROWS if context.quick else (LORA_ROWS if goal == "K7" else INT8_ROWS)
    dense = nn.Linear(shape[1], shape[0], bias=False, dtype=torch.bfloat16, device=context.device)
    dense.weight.data.normal_(0, 0.02)
    dense.requires_grad_(False)
    variants = (_lora if goal == "K7" else _int8)(dense, context)
    x = torch.randn(rows, shape[1], dtype=torch.bfloat16, device=context.device)
    with torch.no_grad():
        truth = dense(x).float()
        errors = {
            name: float((run(x).float() - truth).norm() / truth.norm())
            for name, (run, _) in variants.items()
        }
    spent = timing.compare(
        {name: _steps(x, shape[0], *variant) for name, variant in variants.items()},
        context.device,
        graph=False,
        runs=QUICK_RUNS if context.quick else RUNS,
    )
    first, second = list(spent)[:2]
    return {
        "goal": goal,
        "kind": "forward and backward",
        "out": shape[0],
        "in": shape[1],
        "rows": rows,
        "errors": {name: finite(error) for name, error in errors.items()},
        "ok": all(error <= MOST_ERROR[goal] for error in errors.values()),
        "variants": spent,
        "speedup": spent[second]["median_us"] / spent[first]["median_us"],
    }


Variant = tuple[Callable[[Tensor], Tensor], list[nn.Parameter]]
"""A layer, and what it trains."""


def _steps(
    x: Tensor, width: int, run: Callable[[Tensor], Tensor], trained: list[nn.Parameter]
) -> timing.Calls:
    """Forward and all gradients, on two inputs in turn."""

    def step(x: Tensor, dy: Tensor) -> None:
        torch.autograd.grad(run(x), [x, *trained], dy)

    pairs = [(torch.randn_like(x), x.new_empty(len(x), width).normal_()) for _ in range(2)]
    return [partial(step, x.requires_grad_(), dy) for x, dy in pairs]


def _lora(dense: nn.Linear, context: Context) -> dict[str, Variant]:
    """Ours, PEFT on bitsandbytes, and unsloth's calls, with an adapter that changes nothing yet."""
    lora.register()
    ours = _adapted(QuantLinear.from_linear(dense))
    theirs = _adapted(bitsandbytes_layer(dense))
    layer = theirs.get_submodule("base_model.model.layer")
    matrices = unsloth_calls.Matrix.of(layer)
    # Trainer runs it so: without, PEFT multiplies its float32 adapters in float32
    cast = torch.autocast(context.device.type, torch.bfloat16) if context.on_gpu else nullcontext()

    def peft(x: Tensor) -> Tensor:
        with cast:
            return theirs(x)

    return {
        "qtune": (ours, _trained(ours)),
        "peft + bitsandbytes": (peft, _trained(theirs)),
        "unsloth's calls": (partial(unsloth_calls.projections, [matrices]), _trained(theirs)),
    }


def _adapted(layer: nn.Module) -> nn.Module:
    """The layer in a model of one, with PEFT's adapter."""
    model = nn.Sequential()
    model.add_module("layer", layer)
    model.is_loaded_in_4bit = True
    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["layer"]))


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _int8(dense: nn.Linear, context: Context) -> dict[str, Variant]:
    """LLM.int8() here and there, and ours with the weight alone in 8 bits.

    As there, ours has one scale a row.
    """
    layer = QuantLinear.from_linear(dense, Storage("int8", "row"))
    packed, scales = layer.quant_weight
    theirs = Linear8bitLt(
        dense.in_features, dense.out_features, False, has_fp16_weights=False, threshold=THRESHOLD
    )
    theirs.weight = Int8Params(
        dense.weight.data.cpu().half(), requires_grad=False, has_fp16_weights=False
    )

    def ours(x: Tensor) -> Tensor:
        return linear_int8(
            x, packed, *scales, layer.group_size, dense.out_features, None, THRESHOLD
        )

    return {
        "qtune": (ours, []),
        "bitsandbytes": (theirs.to(context.device), []),
        "qtune, weight only": (layer, []),
    }


def bitsandbytes_layer(dense: nn.Linear) -> Linear4bit:
    """The dense layer in NF4 with nested scales, as QLoRA uses it."""
    from bitsandbytes.functional import quantize_4bit

    layer = Linear4bit(
        dense.in_features,
        dense.out_features,
        bias=False,
        compute_dtype=torch.bfloat16,
        quant_type="nf4",
    )
    packed, state = quantize_4bit(
        dense.weight.data, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    layer.weight.data, layer.weight.quant_state = packed, state
    layer.weight.bnb_quantized = True
    return layer.requires_grad_(False).train()
