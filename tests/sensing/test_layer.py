import pytest
import torch

from qtune.model.load import load_base
from qtune.recipe import Quant
from qtune.sensing.divergence import divergence
from qtune.sensing.gradients import Seen
from qtune.sensing.layer import Layer


@pytest.mark.parametrize("name", ["int4", "int2"])
def test_a_layer_is_what_a_run_would_make_of_it(tiny_model, name):
    device, place = torch.device("cpu"), "model.layers.1.mlp.up_proj"
    dense = load_base(tiny_model, None, device=device).get_submodule(place)
    quantized = load_base(tiny_model, Quant(format=name), device=device).get_submodule(place)
    torch.manual_seed(0)
    seen = [Seen(row, torch.randn(20, 64), torch.randn(20, 128)) for row in range(3)]
    x = torch.cat([it.given for it in seen])
    layer = Layer(place, dense, x.T @ x / len(x), seen, [19, 19, 19])
    found = layer.measure(Quant(format=name))
    assert (found.layer, found.format, found.num_weights) == (place, name, 64 * 128)
    assert found.size_bytes == sum(p.nbytes for p in quantized.parameters())
    change = quantized.dequantize(torch.float32) - dense.weight.float()
    lost = (x @ change.T).square().sum() / (x @ dense.weight.float().T).square().sum()
    assert found.output_error == pytest.approx(float(lost), rel=1e-4)
    expected = divergence(seen, [19, 19, 19], change)
    assert found.divergence == pytest.approx(expected.nats, rel=1e-4)
    assert found.standard_error == pytest.approx(expected.standard_error, rel=1e-4)
