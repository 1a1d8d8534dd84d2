"""unsloth's calls compute what PEFT's layers compute, gradients included."""

import pytest
import torch
from gpu import unsloth_calls
from gpu.layers import _adapted, bitsandbytes_layer
from gpu.unsloth_calls import Matrix
from torch import nn
from torch.nn.functional import silu

SIZE = 64


def adapted(out_features: int, in_features: int) -> nn.Module:
    dense = nn.Linear(in_features, out_features, bias=False, dtype=torch.bfloat16)
    model = _adapted(bitsandbytes_layer(dense)).to(torch.float32)
    layer = model.get_submodule("base_model.model.layer")
    layer.lora_B["default"].weight.data.normal_(0, 0.1)
    return layer


def gradients(y: torch.Tensor, x: torch.Tensor, layers: list[nn.Module]) -> list[torch.Tensor]:
    wanted = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    slope = torch.ones_like(y) + y.detach()
    return [y, *torch.autograd.grad(y, [x, *wanted], slope)]


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 3, SIZE, dtype=torch.bfloat16).requires_grad_()


def assert_close(ours: list[torch.Tensor], truth: list[torch.Tensor]) -> None:
    for mine, exact in zip(ours, truth, strict=True):
        assert mine.shape == exact.shape
        assert (mine.double() - exact.double()).norm() <= 0.02 * exact.double().norm()


def test_projections_of_one_input_share_its_gradient(x: torch.Tensor) -> None:
    layers = [adapted(width, SIZE) for width in (SIZE, 128)]
    made = unsloth_calls.projections([Matrix.of(layer) for layer in layers], x)
    truth = torch.cat([layer(x) for layer in layers], -1)
    assert_close(gradients(torch.cat(made, -1), x, layers), gradients(truth, x, layers))


def test_the_mlp_is_one_function(x: torch.Tensor) -> None:
    gate, up, down = layers = [adapted(128, SIZE), adapted(128, SIZE), adapted(SIZE, 128)]
    made = unsloth_calls.mlp(*(Matrix.of(layer) for layer in layers), x)
    truth = down(silu(gate(x)) * up(x))
    assert_close(gradients(made, x, layers), gradients(truth, x, layers))
