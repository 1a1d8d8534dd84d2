"""Whether a run fits into memory: under which policy of recomputation, or with how many tokens."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass

import torch
from torch import nn

from qtune.errors import UserError
from qtune.memory import Memory, training_memory
from qtune.model.blocks import blocks
from qtune.recompute_choice import Recompute, choose
from qtune.train import recompute
from qtune.train.recompute import POLICIES, Policy
from qtune.workload import Workload

# tokens of a micro-batch that a few more or less do not matter
STEP = 128


@dataclass(frozen=True)
class Fit:
    """What a step takes on each device, and what it makes again in its backward pass."""

    memory: Memory
    recompute: Recompute


def fit(
    model: nn.Module, load: Workload, device: torch.device, free: int, begun: Policy | None
) -> Fit:
    """How the run fits into `free` bytes on each device.

    Raises UserError where it does not, with what would, and where the recipe names a policy that
    the model cannot follow.
    """
    memories = _memories(model, load, device)
    sizes = {policy: memory.total for policy, memory in memories.items()}
    chosen = choose(sizes, free, load.recipe.train.recompute, begun)
    found = Fit(memories[chosen.policy], chosen)
    if found.memory.total > free:
        raise UserError(_too_large(found, load, free, _smaller(model, load, device, free, found)))
    return found


def num_shards(load: Workload) -> int:
    """Over how many devices the parameters are spread."""
    return load.num_processes if load.recipe.train.parallel == "fsdp" else 1


def _memories(model: nn.Module, load: Workload, device: torch.device) -> dict[Policy, Memory]:
    """Bytes of a step under each policy that the model can follow, fastest first.

    Raises UserError where the recipe names one that it cannot.
    """
    wanted = load.recipe.train.recompute
    policies = POLICIES if any(blocks(model)) else POLICIES[:1]
    memories: dict[Policy, Memory] = {}
    for policy in policies:
        with suppress(recompute.ChangedInPlaceError):
            memories[policy] = _memory(model, load, device, policy)
    if wanted != "auto" and wanted not in memories:
        raise UserError(
            f"train.recompute: {wanted} does not work with this model; set it to auto, or to "
            f"{' or '.join(memories)}"
        )
    return memories


def _memory(
    model: nn.Module,
    load: Workload,
    device: torch.device,
    policy: Policy,
    max_tokens: int | None = None,
) -> Memory:
    """Bytes of a step with micro-batches of at most so many tokens, by default the recipe's."""
    largest = load.largest(max_tokens or load.recipe.train.micro_batch_tokens)
    return training_memory(model, largest, device, policy, load.recipe, num_shards(load))


def _smaller(
    model: nn.Module, load: Workload, device: torch.device, free: int, found: Fit
) -> int | None:
    """How many tokens a micro-batch may have for the run to fit; None where that is not enough."""

    def size_at(tokens: int) -> int:
        return _memory(model, load, device, found.recompute.policy, tokens).total

    most = load.recipe.train.micro_batch_tokens
    return largest_below(size_at, load.longest.num_tokens, most, free)


def largest_below(
    size_at: Callable[[int], int], least: int, most: int, free: int, step: int = STEP
) -> int | None:
    """The largest number below `most` whose size fits, a multiple of `step` or `least` itself.

    None where that does not fit. Sizes grow about in a straight line, so the next one to try is
    guessed on that, and every other time halfway.
    """
    low, high = least, most
    size, larger = size_at(low), size_at(high)
    if low >= high or size > free:
        return None
    halfway = False
    while (next_one := (low // step + 1) * step) < high:
        share = 0.5 if halfway else (free - size) / (larger - size)
        guess = int(low + share * (high - low)) // step * step
        guess = min(max(guess, next_one), (high - 1) // step * step)
        found = size_at(guess)
        if found <= free:
            low, size = guess, found
        else:
            high, larger = guess, found
        halfway = not halfway
    return low


def _too_large(found: Fit, load: Workload, free: int, smaller: int | None) -> str:
    """What a run needs that does not fit, and what to set instead."""
    parts = asdict(found.memory)
    largest = max(parts, key=lambda name: parts[name])
    if smaller is None:
        advice = f"try {_advice(largest, found.recompute, load)}"
    else:
        advice = f"train.micro_batch_tokens: {smaller} would fit"
    return (
        f"not enough memory: with train.recompute: {found.recompute.policy} the run needs "
        f"{_gib(found.memory.total)} on each device, {_gib(free)} are free; most goes to {largest} "
        f"({_gib(parts[largest])}); {advice}"
    )


def _advice(largest: str, chosen: Recompute, load: Workload) -> str:
    """What to set where most memory goes to that part and smaller micro-batches are no way out."""
    shorter = f"a smaller data.max_length (one sample has {load.longest.num_tokens} tokens)"
    if largest in ("activations", "backward", "logits"):
        return shorter if chosen.saves_most else f"train.recompute: all, or {shorter}"
    if largest == "gathered":
        return "a model with a smaller vocabulary: embeddings and output layer are whole everywhere"
    if largest in ("weights", "temporary"):
        return "quant.format: nf4, train.parallel: fsdp on more devices, or a smaller model"
    return "a smaller lora.rank"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
