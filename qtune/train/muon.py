"""Muon for matrices and AdamW for the rest, as one optimizer.

Muon's update is PyTorch's: momentum, made nearly orthogonal, and scaled to the size of AdamW's
updates (arXiv 2502.16982, eq. 4), so that a learning rate for AdamW does for both. Orthogonalizing
takes whole matrices: it cannot run on sharded ones.
"""

from collections.abc import Callable
from typing import Any

import torch


class MuonWithAdamW(torch.optim.Optimizer):
    """Matrices [O, I] go to Muon; vectors and stacks of matrices to AdamW."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr})
        matrices = _only(groups, matrices=True)
        rest = _only(groups, matrices=False)
        self._members: list[torch.optim.Optimizer] = []
        if matrices:
            muon = torch.optim.Muon(matrices, lr, momentum=betas[0], adjust_lr_fn="match_rms_adamw")
            self._members.append(muon)
        if rest:
            self._members.append(torch.optim.AdamW(rest, lr, betas=betas, fused=True))
        # whoever sets a rate or restores a state here does so for the members
        self.param_groups = [group for member in self._members for group in member.param_groups]
        for member in self._members:
            member.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for member in self._members:
            member.step()


def _only(groups: list[dict[str, Any]], *, matrices: bool) -> list[dict[str, Any]]:
    kept = [
        {**group, "params": [p for p in group["params"] if (p.ndim == 2) == matrices]}
        for group in groups
    ]
    return [group for group in kept if group["params"]]
