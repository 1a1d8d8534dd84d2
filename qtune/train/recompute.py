"""What the blocks of a model keep for the backward pass, and what they make again in it.

Three policies, from the fastest step to the smallest:

    none   everything autograd asks for is kept
    cheap  outputs of matrix products and of attention are kept; norms, activations, rotations,
           casts and what else only reads and writes memory are made again
    all    only the input of each block is kept; the block runs twice

All give the same bits: what is made again is made from the same numbers by the same operations.
`cheap` is PyTorch's selective checkpointing: it caches what operations return and hands that out
the second time. So it is not for models that change outputs of products in place.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, get_args

from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from qtune.model.blocks import blocks

Policy = Literal["none", "cheap", "all"]
POLICIES: tuple[Policy, ...] = get_args(Policy)

# products of dense matrices, and which of their arguments is the left factor
DENSE_PRODUCTS = {
    "aten::mm": 0,
    "aten::bmm": 0,
    "aten::addmm": 1,
    "aten::baddbmm": 1,
    "aten::_grouped_mm": 0,
    "aten::_scaled_mm": 0,
}
QUANTIZED_PRODUCTS = {
    "qtune::linear",
    "qtune::linear_int8",
    "qtune::lora_linear",
    "qtune::scaled_linear",
}
ATTENTION = {
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_flash_attention_forward",
    "aten::_efficient_attention_forward",
    "qtune::packed_attention",
}
# a product with fewer multiplications per output than this share of the output's width, such as
# the second half of an adapter, costs less than the memory to keep it
LEAST_DEPTH = 1 / 8
# how PyTorch begins to say that a kept output is no longer what it was
CHANGED = "Tensor cached during selective activation checkpoint has been mutated"


class ChangedInPlaceError(RuntimeError):
    """The model changes in place what `cheap` has to keep."""


def use(model: nn.Module, policy: Policy) -> None:
    """Make the model's blocks follow the policy whenever they train; no blocks, no effect."""
    run = _checkpoint(policy)
    for block in blocks(model):
        block.gradient_checkpointing = policy != "none"
        block._gradient_checkpointing_func = run  # type: ignore[assignment]


@contextmanager
def changes_reported() -> Iterator[None]:
    """Raises ChangedInPlaceError where a backward pass within shows that the model does so."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(CHANGED):
            raise
        raise ChangedInPlaceError(str(error)) from error


def _checkpoint(policy: Policy) -> Callable[..., Any]:
    """What transformers calls as f(block, *inputs) in place of the block."""
    if policy != "cheap":
        return partial(checkpoint, use_reentrant=False)
    contexts = partial(create_selective_checkpoint_contexts, _decide)
    return partial(checkpoint, use_reentrant=False, context_fn=contexts)


def _decide(
    context: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any
) -> CheckpointPolicy:
    """What selective checkpointing does with the output of op(*args, **kwargs)."""
    name = op.name()
    kept = (
        name in QUANTIZED_PRODUCTS
        or (name in DENSE_PRODUCTS and _is_deep(*args[DENSE_PRODUCTS[name] :][:2]))
        or (name in ATTENTION and not _drops(op, args, kwargs))
    )
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _is_deep(left: Any, right: Any) -> bool:
    """Whether the product of [.., T, I] and [.., I, O] takes many multiplications per output."""
    return bool(left.shape[-1] >= LEAST_DEPTH * right.shape[-1])


def _drops(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether attention drops weights.

    Then it must run again: skipping it would shift the random numbers of what drops after it.
    """
    names = [argument.name for argument in op._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    return bool(given.get("dropout_p", 0.0) > 0)
