"""Bytes of a training step, counted on the model itself rather than estimated.

The step is run once, forward and backward, on the `meta` device, where tensors have shapes and no
data. Whatever it keeps and makes again there is what it keeps and makes again in training, so the
count follows every architecture, recipe and policy of recomputation.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from qtune.data.collate import Batch
from qtune.live_bytes import LiveBytes
from qtune.model import attention
from qtune.model.forward import forward_logits
from qtune.model.head import output_head
from qtune.quant.linear import QuantLinear
from qtune.train import recompute
from qtune.train.objectives import sft

# AdamW keeps two moments beside each float32 weight and its gradient
MOMENTS = 2


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step by what they are for."""

    weights: int
    """Frozen weights, packed or not."""
    adapter: int
    """Trained weights."""
    gradients: int
    """Their gradients."""
    optimizer: int
    """AdamW's moments."""
    activations: int
    """What lies between forward and backward of the largest micro-batch, logits apart. On CUDA rows
    with room for an adapter (`rows.wanted_room`) take 64/I more, which is not in it."""
    backward: int
    """What the fullest moment of the step adds to that: what the backward pass makes again, and
    gradients of activations."""
    logits: int
    """As many logits as the loss holds at a time, or the gradient of all of them."""
    temporary: int
    """The largest matrix while it is dequantized."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())


def training_memory(
    model: nn.Module, batch: Batch, device: torch.device, policy: recompute.Policy
) -> Memory:
    """The bytes of a step on `device` whose largest micro-batch is `batch`.

    Model and batch are on `meta`; the model is left in training, with that policy. Raises
    ChangedInPlaceError where the model cannot follow it.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    size = sum(p.nbytes for p in trained)
    recompute.use(model.train(), policy)
    fused = _FusedAttention()
    with fused, attention.standing_for(device.type), recompute.changes_reported():
        _attend_when_recomputed(model, fused)
        kept, peak = _run_step(model, batch, trained)
    logits, are_kept = _logits(model, batch, device)
    return Memory(
        weights=sum(p.nbytes for p in model.parameters() if not p.requires_grad),
        adapter=size,
        gradients=size,
        optimizer=MOMENTS * size,
        activations=kept - logits if are_kept else kept,
        backward=peak - kept,
        logits=logits,
        temporary=_largest_dense(model),
    )


def _run_step(model: nn.Module, batch: Batch, trained: list[nn.Parameter]) -> tuple[int, int]:
    """Bytes between forward and backward pass, and the most at any moment, without parameters."""
    # as in every micro-batch but the first, gradients are there and are added to
    gradients = [torch.zeros_like(parameter) for parameter in trained]
    for parameter, gradient in zip(trained, gradients, strict=True):
        parameter.grad = gradient
    with LiveBytes([*model.parameters(), *model.buffers(), *gradients]) as live:
        loss, _ = sft.loss(model, batch)
        kept = live.now
        torch.autograd.backward(loss)
    for parameter in trained:
        parameter.grad = None
    return kept, live.peak


def _logits(model: nn.Module, batch: Batch, device: torch.device) -> tuple[int, bool]:
    """Bytes of the logits, and whether the step keeps as many for the backward pass."""
    head = output_head(model)
    if head is not None:
        return head.logits_bytes(len(batch.targets), device), False
    with torch.no_grad():
        return forward_logits(model, batch).nbytes, True


def _attend_when_recomputed(model: nn.Module, fused: "_FusedAttention") -> None:
    """Let blocks run in that mode the second time too; the backward pass leaves modes behind."""
    for block in recompute.blocks(model):
        run: Any = block._gradient_checkpointing_func
        within: Any = partial(_run_attending, run, fused)
        block._gradient_checkpointing_func = within


def _run_attending(
    run: Callable[..., Any], fused: "_FusedAttention", block: Callable[..., Any], *inputs: Any
) -> Any:
    def attending(*inputs: Any) -> Any:
        with fused:
            return block(*inputs)

    return run(attending, *inputs)


class _FusedAttention(TorchFunctionMode):
    """On `meta`, attention as devices run it: PyTorch would take the path that keeps [T, T]."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        return _fused_attention(*args, **kwargs)


def _fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    # the mask is not kept, and what it hides changes no shape
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    y: Tensor = fused(q, k, v, dropout_p, is_causal, scale=scale)[0]
    return y


def _largest_dense(model: nn.Module) -> int:
    """Bytes of the largest quantized matrix in the compute dtype."""
    sizes = [
        layer.in_features * layer.out_features * layer.compute_dtype.itemsize
        for layer in model.modules()
        if isinstance(layer, QuantLinear)
    ]
    return max(sizes, default=0)
