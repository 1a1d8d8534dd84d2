"""Muon's updates against singular vectors in float64, and AdamW for what is no matrix."""

import math

import torch
from torch import Tensor, nn

from qtune.train.muon import MuonWithAdamW

LR, BETAS = 0.01, (0.9, 0.999)


def optimizer_of(*parameters: nn.Parameter, decay: float = 0.0) -> MuonWithAdamW:
    group = {"params": list(parameters), "weight_decay": decay, "scale": 1.0}
    return MuonWithAdamW([group], LR, BETAS)


def gradients(*shape: int, num: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=generator) for _ in range(num)]


def test_updates_are_orthogonal_and_of_the_size_of_adamws() -> None:
    weight = nn.Parameter(torch.zeros(8, 40))
    optimizer = optimizer_of(weight)
    moment = torch.zeros(8, 40, dtype=torch.float64)
    for gradient in gradients(8, 40):
        before = weight.detach().clone()
        weight.grad = gradient
        optimizer.step()
        update = (before - weight.detach()).double() / LR
        moment = BETAS[0] * moment + (1 - BETAS[0]) * gradient.double()
        ahead = (1 - BETAS[0]) * gradient.double() + BETAS[0] * moment
        u, _, v = torch.linalg.svd(ahead, full_matrices=False)
        exact = 0.2 * math.sqrt(40) * u @ v
        # five Newton-Schulz steps leave singular values between 0.7 and 1.2
        values = torch.linalg.svdvals(update) / torch.linalg.svdvals(exact)
        assert float(values.min()) > 0.65 and float(values.max()) < 1.25
        assert float(nn.functional.cosine_similarity(update.flatten(), exact.flatten(), 0)) > 0.97
        # an update of AdamW has a root mean square of 0.2 to 0.4
        assert 0.1 < float(update.square().mean().sqrt()) < 0.3


def test_vectors_and_stacks_of_matrices_get_adamw() -> None:
    shapes = [(5,), (2, 3, 4)]
    ours = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    theirs = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    matrix = nn.Parameter(torch.ones(3, 3))
    mixed = optimizer_of(matrix, *ours, decay=0.1)
    plain = torch.optim.AdamW(theirs, LR, betas=BETAS, weight_decay=0.1, fused=True)
    for step in range(3):
        matrix.grad = torch.eye(3)
        for own, their in zip(ours, theirs, strict=True):
            own.grad = their.grad = torch.full_like(own, 0.1 * step + 0.1)
        mixed.step()
        plain.step()
    for own, their in zip(ours, theirs, strict=True):
        assert torch.equal(own, their)
    assert list(mixed.state[matrix]) == ["momentum_buffer"]
    assert set(mixed.state[ours[0]]) == {"step", "exp_avg", "exp_avg_sq"}


def test_rates_and_decay_are_those_of_the_groups() -> None:
    matrix, vector = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))
    optimizer = optimizer_of(matrix, vector, decay=0.5)
    assert [group["scale"] for group in optimizer.param_groups] == [1.0, 1.0]
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    matrix.grad, vector.grad = torch.zeros(4, 4), torch.zeros(4)
    optimizer.step()
    torch.testing.assert_close(matrix.detach(), torch.full((4, 4), 0.95))
    torch.testing.assert_close(vector.detach(), torch.full((4,), 0.95))
    optimizer.zero_grad()
    assert matrix.grad is None and vector.grad is None


def test_matrices_or_vectors_alone() -> None:
    for parameter in (nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))):
        optimizer = optimizer_of(parameter)
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert len(optimizer.param_groups) == 1 and float(parameter.detach().max()) < 1
