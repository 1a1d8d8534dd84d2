"""Lets a model on the `meta` device take the way through its code that it takes on a real one.

Two things go otherwise there. PyTorch has no fused attention for `meta` and would take a path that
keeps [T, T]. And transformers looks at numbers, which there are none of, to tell whether a row
holds several texts: rows that come by this question never do (`model/forward.py`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from qtune.model import attention
from qtune.model.blocks import blocks


@contextmanager
def as_on(device: torch.device, model: nn.Module) -> Iterator[None]:
    """Meanwhile the model, on `meta`, does what it would do on that device.

    To be entered behind `recompute.use`, whose functions are wrapped here.
    """
    mode = _AsOnDevice()
    with mode, attention.standing_for(device.type):
        # the backward pass leaves modes behind, and recomputes blocks
        for block in blocks(model):
            run: Any = block._gradient_checkpointing_func
            within: Any = partial(_run_within, run, mode)
            block._gradient_checkpointing_func = within
        yield


def _run_within(
    run: Callable[..., Any], mode: "_AsOnDevice", block: Callable[..., Any], *inputs: Any
) -> Any:
    def within(*inputs: Any) -> Any:
        with mode:
            return block(*inputs)

    return run(within, *inputs)


class _AsOnDevice(TorchFunctionMode):
    """Fused attention, and yes to a question about numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            return _fused_attention(*args, **kwargs)
        if func is Tensor.__bool__ and args[0].is_meta:
            return True
        return func(*args, **kwargs)


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
