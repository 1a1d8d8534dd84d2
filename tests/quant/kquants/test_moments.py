import torch

from qtune.quant.kquants.moments import Moments, Target, line, moments, quotient


def drawn() -> tuple[Target, torch.Tensor]:
    torch.manual_seed(0)
    x, worth = torch.randn(4, 16, 5), torch.rand(4, 16, 5)
    return Target.of(x, worth), torch.randint(0, 16, (4, 16, 5)).float()


def test_sums_over_groups_in_float64() -> None:
    target, levels = drawn()
    q, worth = levels.double(), target.worth.double()
    exact = (worth * q, worth * q * q, worth * q * target.x.double())
    for found, terms in zip(moments(target, levels), exact, strict=True):
        assert torch.allclose(found.double(), terms.sum(1), rtol=1e-5, atol=1e-5)


def test_line_is_that_of_least_squares() -> None:
    target, levels = drawn()
    found = line(moments(target, levels), target.worth.sum(1), target.worth_x.sum(1))
    root = target.worth[1, :, 2].double().sqrt()
    columns = torch.stack([levels[1, :, 2].double(), -torch.ones(16).double()], 1)
    exact = torch.linalg.lstsq(
        columns * root.unsqueeze(1), (target.x[1, :, 2] * root).unsqueeze(1)
    ).solution[:, 0]
    made = torch.stack([found.scale[1, 2], found.minimum[1, 2]]).double()
    assert torch.allclose(made, exact, rtol=1e-3, atol=1e-5)
    assert found.unique.all()


def test_equal_levels_determine_no_line() -> None:
    target, _ = drawn()
    found = moments(target, torch.full_like(target.x, 7))
    assert not line(found, target.worth.sum(1), target.worth_x.sum(1)).unique.any()
    nothing = Moments(*torch.zeros(3, 1))
    assert not line(nothing, torch.ones(1), torch.ones(1)).unique.any()


def test_quotient_of_nothing_is_nothing() -> None:
    assert quotient(3.0, torch.tensor([0.0, 2.0])).tolist() == [0, 1.5]
    assert quotient(torch.tensor([0.0, -3.0]), torch.tensor([0.0, 2.0])).tolist() == [0, -1.5]
