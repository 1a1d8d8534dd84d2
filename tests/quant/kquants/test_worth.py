import torch

from qtune.quant.kquants.worth import LEAST, of_inputs


def test_worths_of_inputs_are_relative_and_never_nothing() -> None:
    assert of_inputs(torch.tensor([0.0, 3.0, 6.0])).tolist() == [torch.tensor(LEAST), 1.0, 2.0]
    assert of_inputs(torch.zeros(2)).tolist() == [1, 1]
    tiny = of_inputs(torch.tensor([1e-30, 3e-30]))
    assert torch.allclose(tiny, torch.tensor([0.5, 1.5]))
