"""Makes the attention of one loaded model rotate q and k by one op.

In transformers attention calls the function `apply_rotary_pos_emb` of its own module. Here one
instance gets a subclass whose forward is the same code, in which that name alone stands for
another function. That is sound because the function it stood for is first checked to be the
half-rotation, and because calls that the op does not cover still reach it.
"""

import inspect
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from qtune_kernels.rope import rope

NAME = "apply_rotary_pos_emb"
# head size and tokens of q and k on trial
SIZE, TOKENS = 8, 5


def fuse_rotation(module: nn.Module) -> bool:
    """Whether the module was attention that rotates halves, and now does so by the op."""
    original: Any = type(module)
    forward = original.forward
    if isinstance(module, _Rotating) or not isinstance(forward, FunctionType):
        return False
    rotation = forward.__globals__.get(NAME) if NAME in forward.__code__.co_names else None
    if rotation is None or not _rotates_halves(rotation):
        return False
    module.__class__ = _rotating_class(original)
    return True


class _Rotating(nn.Module):
    """Attention in which the name of the rotation stands for `_by_op`'s function."""


@cache
def _rotates_halves(rotation: Callable[..., Any]) -> bool:
    """Whether a function of q, k, cos and sin gives what the op gives."""
    parameters = inspect.signature(rotation).parameters.values()
    required = [p.name for p in parameters if p.default is inspect.Parameter.empty]
    if required != ["q", "k", "cos", "sin"]:
        return False
    q, k = (torch.randn(2, heads, TOKENS, SIZE, device="cpu") for heads in (3, 1))
    cos, sin = torch.randn(2, 2, TOKENS, SIZE, device="cpu")
    try:
        turned = rotation(q, k, cos, sin)
    except RuntimeError:
        # it wants other shapes, as GPT-OSS with a cosine for each pair
        return False
    pairs = zip(turned, rope(q, k, cos, sin), strict=True)
    return all(torch.allclose(one, other, rtol=1e-4, atol=1e-5) for one, other in pairs)


@cache
def _rotating_class(original: Any) -> type[nn.Module]:
    forward: FunctionType = original.forward
    names = forward.__globals__ | {NAME: _by_op(forward.__globals__[NAME])}
    own = FunctionType(
        forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
    )
    own.__kwdefaults__ = forward.__kwdefaults__
    return type(f"Fused{original.__name__}", (_Rotating, original), {"forward": own})


def _by_op(original: Callable[..., Any]) -> Callable[..., Any]:
    """The op where whole heads of one dtype turn; `original` where not."""

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> Any:
        whole = q.dim() == 4 and cos.dim() == 3 and cos.shape[-1] == q.shape[-1]
        if options or not whole or not q.dtype == k.dtype == cos.dtype:
            return original(q, k, cos, sin, **options)
        return rope(q, k, cos, sin)

    return rotate
