"""What the correctness part asks of an op: the op, the same in plain PyTorch, and its inputs."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor


class Problem(NamedTuple):
    """`op` and `plain` take `inputs` and give equal outputs; plain also in float64."""

    op: Callable[..., Any]
    plain: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    """All of them get gradients, which are compared as well."""
    facts: dict[str, Any]


class Exact(NamedTuple):
    """`op` and `plain` take nothing and give the same bits."""

    op: Callable[[], Any]
    plain: Callable[[], Any]
    facts: dict[str, Any]
