"""Bytes of a training step, counted on the model itself rather than estimated.

The step is run once, forward and backward, on the `meta` device, where tensors have shapes and no
data. Whatever it keeps and makes again there is what it keeps and makes again in training, so the
count follows every architecture, objective, recipe and policy of recomputation.

Where the base is sharded (FSDP2), a device holds its share of every tensor, and for the time they
run the whole tensors of a block; see `_sharded`.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import nn

from qtune.data.collate import ROW_MULTIPLE, Batch, collate
from qtune.data.sample import Sample
from qtune.live_bytes import LiveBytes
from qtune.meta_mode import as_on
from qtune.model.blocks import blocks
from qtune.model.forward import forward_logits, packs
from qtune.model.head import output_head
from qtune.quant.linear import QuantLinear
from qtune.recipe import Recipe, Train
from qtune.train import recompute
from qtune.train.objective import Step, load_objective
from qtune.train.optim import state_bytes

# blocks that are whole at a time where the base is sharded: the one that runs and the next
WHOLE_BLOCKS = 2


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
    """What the optimizer keeps beside each weight, and the moving average if there is one."""
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
    gathered: int = 0
    """Where the base is sharded: blocks that are whole while they run, and what is in no block."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())


def training_memory(
    model: nn.Module,
    samples: Sequence[Sample],
    device: torch.device,
    policy: recompute.Policy,
    recipe: Recipe,
    num_shards: int = 1,
) -> Memory:
    """The bytes of a step on one `device` whose largest micro-batch holds these samples.

    The model is on `meta` and left in training, with that policy; the parameters are spread over
    `num_shards` devices. Raises ChangedInPlaceError where the model cannot follow the policy.
    """
    collated = partial(
        collate,
        device="meta",
        multiple=ROW_MULTIPLE,
        packing=recipe.data.packing and packs(model),
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    size = sum(p.nbytes for p in trained)
    recompute.use(model.train(), policy)
    with as_on(device, model), recompute.changes_reported():
        kept, peak = _run_step(model, samples, collated, recipe.train)
        logits, are_kept = _logits(model, collated(samples), device)
    whole = Memory(
        weights=sum(p.nbytes for p in model.parameters() if not p.requires_grad),
        adapter=size,
        gradients=size,
        optimizer=state_bytes(model, recipe.train),
        activations=kept - logits if are_kept else kept,
        backward=peak - kept,
        logits=logits,
        temporary=largest_dense(model),
    )
    return whole if num_shards == 1 else _sharded(whole, model, num_shards)


def _sharded(whole: Memory, model: nn.Module, num_shards: int) -> Memory:
    """The bytes of one device where FSDP2 spreads all parameters over several.

    Each holds a share of parameters and optimizer state. Whole are the block that runs, the next
    one, which is fetched meanwhile, and all that is in no block (embeddings, output layer), which
    stays whole from forward to backward pass. When a step begins, what was received of the latter
    lies beside it for a moment, in which there are no activations yet. Gradients of adapters are
    summed whole over a step's micro-batches and shared out at its end.
    """
    in_blocks = [_parameter_bytes(block) for block in blocks(model)]
    around = _parameter_bytes(model) - sum(in_blocks)
    later = whole.activations + whole.backward + whole.logits + whole.temporary

    def part(size: int) -> int:
        return -(-size // num_shards)

    return replace(
        whole,
        weights=part(whole.weights),
        adapter=part(whole.adapter),
        gradients=whole.gradients + part(whole.gradients),
        optimizer=part(whole.optimizer),
        gathered=around + WHOLE_BLOCKS * max(in_blocks, default=0) + max(0, around - later),
    )


def _parameter_bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def _run_step(
    model: nn.Module, samples: Sequence[Sample], collated: Callable[..., Batch], settings: Train
) -> tuple[int, int]:
    """Bytes between forward and backward pass, and the most at any moment, without parameters."""
    objective = load_objective(settings)
    step = Step(samples, batches=lambda others: [collated(others)], total=lambda tensor: tensor)
    # as in every micro-batch but the first, gradients are there and are added to
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.zeros_like(parameter) for parameter in trained]
    for parameter, gradient in zip(trained, gradients, strict=True):
        parameter.grad = gradient
    batch = collated(samples)
    with LiveBytes([*model.parameters(), *model.buffers(), *gradients]) as live:
        loss, _ = objective.loss(model, batch, objective.shared(model, step))
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


def largest_dense(model: nn.Module) -> int:
    """Bytes of the largest quantized matrix in the compute dtype; 0 where there is none."""
    sizes = [
        layer.in_features * layer.out_features * layer.compute_dtype.itemsize
        for layer in model.modules()
        if isinstance(layer, QuantLinear)
    ]
    return max(sizes, default=0)
