"""One layer: codes, start and figures."""

import pytest
import torch

from qtune.model.calibration.fit import Wanted, fit
from qtune.quant.linear import QuantLinear
from qtune.quant.storage import Storage
from qtune.recipe import Quant


@pytest.fixture
def case():
    """An empty layer with its dense weight, the tokens it is given and their Hessian."""
    torch.manual_seed(0)
    layer = QuantLinear(64, 48, storage=Storage("int3", 32), device="meta")
    x = torch.randn(500, 64) @ torch.randn(64, 64) * torch.rand(64)
    return layer, torch.randn(48, 64), x, x.T @ x / len(x)


def lost(layer, weight, x, start=None):
    """What part of the outputs is lost, in float64."""
    a, b = start or (torch.zeros(1, 64), torch.zeros(48, 1))
    difference = (
        weight.double() - layer.dequantize(torch.float32).double() - b.double() @ a.double()
    )
    outputs = x.double() @ difference.T, x.double() @ weight.double().T
    return float(outputs[0].square().sum() / outputs[1].square().sum())


def test_figures_are_what_outputs_lose(case):
    layer, weight, x, hessian = case
    quant = Quant(format="int3", group_size=32, method="gptq")
    found = fit("a.b", layer, weight, hessian, Wanted(quant, "cloq", {"a.b": 8}))
    assert found.figures.error == pytest.approx(lost(layer, weight, x), rel=1e-3)
    adapted = lost(layer, weight, x, found.start)
    assert found.figures.adapted_error == pytest.approx(adapted, rel=1e-3)
    assert adapted < 0.7 * found.figures.error
    assert (found.figures.name, found.figures.format, found.figures.method) == (
        "a.b",
        "int3",
        "gptq",
    )
    again = QuantLinear(64, 48, storage=layer.storage)
    again.load(found.tensors)
    assert torch.equal(again.dequantize(), layer.dequantize())


def test_method_and_hessian_count(case):
    layer, weight, _, hessian = case
    errors = {
        method: fit("a", layer, weight, hessian, Wanted(Quant(method=method), None, {})).figures
        for method in ("nearest", "gptq")
    }
    assert errors["gptq"].error < 0.8 * errors["nearest"].error
    assert errors["gptq"].adapted_error is None


def test_layer_without_an_adapter_has_no_start(case):
    layer, weight, _, hessian = case
    assert fit("a", layer, weight, hessian, Wanted(Quant(), "cloq", {"b": 4})).start is None


def test_without_a_hessian_codes_are_the_nearest(case):
    layer, weight, _, _ = case
    wanted = Wanted(Quant(format="int3", group_size=32, method="gptq"), "cloq", {"a": 4})
    found = fit("a", layer, weight, None, wanted)
    expected = layer.pack(weight)
    assert all(torch.equal(found.tensors[name], expected[name]) for name in expected)
    assert found.start is None and found.figures.error is None
    assert found.figures.method == "nearest"


def test_start_that_changes_codes_keeps_the_method(case):
    layer, weight, x, hessian = case
    kinds = {
        method: fit("a", layer, weight, hessian, Wanted(Quant(method=method), "pissa", {"a": 8}))
        for method in ("nearest", "gptq")
    }
    errors = {method: found.figures.adapted_error for method, found in kinds.items()}
    assert errors["gptq"] < 0.8 * errors["nearest"]
    layer.load(kinds["gptq"].tensors)
    assert errors["gptq"] == pytest.approx(lost(layer, weight, x, kinds["gptq"].start), rel=1e-3)


def test_trouble_with_the_hessian_is_noted(case):
    layer, weight, _, hessian = case
    hessian = hessian - 0.5 * hessian.diagonal().mean() * torch.eye(64)
    found = fit("a", layer, weight, hessian, Wanted(Quant(method="gptq"), None, {}))
    assert found.figures.notes
