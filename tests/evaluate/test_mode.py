import pytest
import torch
from torch import nn

from qtune.evaluate.mode import measuring


@pytest.mark.parametrize("training", [True, False])
def test_mode_comes_back_even_after_an_error(training: bool) -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2)).train(training)
    with pytest.raises(RuntimeError), measuring(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        raise RuntimeError
    assert all(module.training is training for module in model.modules())
    assert torch.is_grad_enabled()


def test_what_is_cached_while_measuring_can_be_trained_with() -> None:
    layer = nn.Linear(2, 2)
    with measuring(layer):
        cached = torch.ones(1, 2)
    layer(cached).sum().backward()
    assert layer.weight.grad is not None
