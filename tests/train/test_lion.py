"""Lion against its equations in float64, and what it keeps."""

import torch
from torch import Tensor, nn

from qtune.train.lion import Lion

LR, BETAS, DECAY = 0.01, (0.9, 0.99), 0.1


def reference(start: Tensor, gradients: list[Tensor]) -> Tensor:
    """Algorithm 2 of the paper, step by step in float64."""
    weight, moment = start.double(), torch.zeros_like(start, dtype=torch.float64)
    for gradient in gradients:
        direction = torch.sign(BETAS[0] * moment + (1 - BETAS[0]) * gradient.double())
        weight = weight - LR * (direction + DECAY * weight)
        moment = BETAS[1] * moment + (1 - BETAS[1]) * gradient.double()
    return weight


def run(start: Tensor, gradients: list[Tensor]) -> tuple[nn.Parameter, Lion]:
    weight = nn.Parameter(start.clone())
    optimizer = Lion([{"params": [weight]}], LR, BETAS, DECAY)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight, optimizer


def test_follows_the_equations() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(7, 5, generator=generator)
    gradients = [torch.randn(7, 5, generator=generator) for _ in range(50)]
    weight, _ = run(start, gradients)
    expected = reference(start, gradients)
    torch.testing.assert_close(weight.detach().double(), expected, rtol=0, atol=1e-5)


def test_every_entry_moves_by_the_learning_rate_whatever_its_gradient() -> None:
    weight, _ = run(torch.zeros(2, 2), [torch.tensor([[1e-6, -1.0], [50.0, 0.0]])])
    torch.testing.assert_close(weight.detach(), LR * torch.tensor([[-1.0, 1.0], [-1.0, 0.0]]))


def test_keeps_one_moment() -> None:
    weight, optimizer = run(torch.ones(3, 2), [torch.ones(3, 2)])
    assert list(optimizer.state[weight]) == ["exp_avg"]
    torch.testing.assert_close(optimizer.state[weight]["exp_avg"], torch.full((3, 2), 0.01))


def test_groups_have_settings_of_their_own_and_the_ungraded_stay() -> None:
    fast, slow, left = (nn.Parameter(torch.ones(2, 2)) for _ in range(3))
    groups = [
        {"params": [fast], "lr": 0.5, "weight_decay": 0.0},
        {"params": [slow, left], "lr": 0.1, "weight_decay": 1.0},
    ]
    optimizer = Lion(groups, 1.0)
    fast.grad = slow.grad = torch.ones(2, 2)
    optimizer.step()
    torch.testing.assert_close(fast.detach(), torch.full((2, 2), 0.5))
    torch.testing.assert_close(slow.detach(), torch.full((2, 2), 0.8))
    assert torch.equal(left.detach(), torch.ones(2, 2)) and left not in optimizer.state
