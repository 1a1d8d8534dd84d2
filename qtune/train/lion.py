"""Lion (arXiv 2302.06675, algorithm 2): the sign of an interpolated momentum, with weight decay.

It is here because PyTorch has none. One moment instead of AdamW's two. A step has the size of the
learning rate in every entry, so that should be three to ten times lower than AdamW's.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Lion(torch.optim.Optimizer):
    """Keeps `exp_avg` for each parameter; works on sharded parameters, each entry by itself."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._update(parameters, **{k: group[k] for k in self.defaults})

    def _update(
        self,
        parameters: list[Tensor],
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        moments = [self._moment(p) for p in parameters]
        # one launch for all tensors of the group
        directions = torch._foreach_lerp(moments, gradients, 1 - betas[0])
        torch._foreach_sign_(directions)
        torch._foreach_mul_(parameters, 1 - lr * weight_decay)
        torch._foreach_add_(parameters, directions, alpha=-lr)
        torch._foreach_lerp_(moments, gradients, 1 - betas[1])

    def _moment(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
        moment: Tensor = state["exp_avg"]
        return moment
