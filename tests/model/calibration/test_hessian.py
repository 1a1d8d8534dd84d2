"""Second moments against float64, and which layers share their inputs."""

import pytest
import torch
from torch import nn

from qtune.model.calibration.hessian import Enough, Hessian, measuring, output_error, sharing


def test_mean_over_all_tokens_against_float64():
    torch.manual_seed(0)
    parts = [torch.randn(2, 300, 24).bfloat16() * 30, torch.randn(7, 24).bfloat16()]
    found = Hessian()
    for part in parts:
        found.add(part)
    tokens = torch.cat([part.flatten(0, -2) for part in parts]).double()
    expected = tokens.T @ tokens / len(tokens)
    assert found.mean().dtype == torch.float32 and found.num_tokens == 607
    torch.testing.assert_close(found.mean().double(), expected, rtol=1e-5, atol=1e-3)


def test_no_tokens_no_mean():
    found = Hessian()
    assert found.mean() is None
    found.add(torch.zeros(0, 8))
    assert found.mean() is None


class Net(nn.Module):
    """a and b share an input, c has one of equal values, d runs twice, e never."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d, self.e = (nn.Linear(4, 4) for _ in range(5))

    def forward(self, x):
        h = self.b(x) + self.a(x) + self.c(x.clone())
        return self.d(self.d(h))


def layers(net):
    return dict(net.named_children())


def test_layers_share_what_is_the_same_tensor():
    net = Net()
    found = sharing(layers(net), lambda: net(torch.ones(2, 4)))
    assert found == [["b", "a"], ["c"], ["d"]]


def test_in_place_change_makes_another_input():
    net = Net()

    def run():
        x = torch.ones(2, 4)
        net.a(x)
        x.add_(1)
        net.b(x)

    assert sharing(layers(net), run) == [["a"], ["b"]]


def test_measuring_stops_when_told_and_leaves_no_hook():
    net = Net()
    with measuring({"c": net.c}, stop=True) as found, pytest.raises(Enough):
        net(torch.ones(2, 4))
    assert torch.equal(found["c"].mean(), torch.ones(4, 4))
    with measuring(layers(net)) as found:
        net(torch.ones(3, 4))
    assert found["d"].num_tokens == 6 and found["e"].mean() is None
    net(torch.ones(3, 4))
    assert found["d"].num_tokens == 6


def test_output_error_is_that_of_outputs():
    torch.manual_seed(0)
    x, weight, difference = torch.randn(50, 8), torch.randn(5, 8), torch.randn(5, 8) * 0.1
    expected = (x @ difference.T).square().sum() / (x @ weight.T).square().sum()
    found = output_error(difference, weight, x.T @ x / 50)
    assert found == pytest.approx(float(expected), rel=1e-5)
    assert output_error(difference, torch.zeros(5, 8), x.T @ x) == 0
