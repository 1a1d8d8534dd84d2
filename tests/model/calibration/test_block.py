"""The inputs that layers are fitted to, against a run of the whole model with hooks, in float64."""

import pytest
import torch
from torch import nn

from qtune.model.calibration import block as module
from qtune.model.calibration.block import calibrate_block, dense_block
from qtune.model.calibration.dense import load_dense
from qtune.model.calibration.fit import Wanted, fit
from qtune.model.calibration.hessian import sharing
from qtune.model.calibration.trace import trace
from qtune.model.quant_config import QtuneConfig
from qtune.quant.linear import QuantLinear
from qtune.recipe import Calibration, Quant

CPU = torch.device("cpu")


def whole_model_hessians(model, rows, kinds):
    """Mean of x^T x, float64, of all layers of these kinds, found by running the model itself."""
    sums, counts = {}, {}

    def hook(name):
        def add(layer, args):
            x = args[0].detach().flatten(0, -2).double()
            sums[name] = sums.get(name, 0) + x.T @ x
            counts[name] = counts.get(name, 0) + len(x)

        return add

    layers = {n: m for n, m in model.named_modules() if isinstance(m, kinds) and n != "lm_head"}
    hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    with torch.no_grad():
        for row in rows:
            model.base_model(torch.tensor([row]), use_cache=False)
    for handle in hooks:
        handle.remove()
    return {name: total / counts[name] for name, total in sums.items()}


@pytest.fixture
def calibrate(tmp_path, rows, monkeypatch):
    """Calibrates a folder's blocks: the model, outcomes of its blocks, and Hessians by layer."""
    used = {}

    def noted(name, layer, weight, hessian, *rest):
        used[name] = hessian
        return fit(name, layer, weight, hessian, *rest)

    monkeypatch.setattr(module, "fit", noted)

    def run(folder, *, init=None, rank=2, shares=False, **settings):
        quant = Quant(group_size=16, **settings)
        config = QtuneConfig.of(quant)
        dense = load_dense(folder, config, tmp_path / "l", device=CPU, dtype=torch.float32)
        with torch.no_grad():
            found = trace(dense.model, rows, lambda name: dense_block(dense, name))
        wanted = Wanted(quant, init, dict.fromkeys(dense.weights, rank), shares)
        hidden = list(found.hidden)
        outcomes = [
            calibrate_block(dense, name, hidden, found.calls[name], wanted) for name in found.names
        ]
        return dense.model, outcomes, used

    return run


def finish(model, outcomes):
    """The calibrated model with all its codes, and adapters' starts as hooks."""
    for outcome in outcomes:
        for name in {key.rpartition(".")[0] for key in outcome.tensors}:
            layer = model.get_submodule(name)
            layer.load({n: outcome.tensors[f"{name}.{n}"] for n in layer.tensor_names})
        for name, (a, b) in outcome.starts.items():
            adding = lambda m, args, y, a=a, b=b: y + args[0] @ a.T @ b.T  # noqa: E731
            model.get_submodule(name).register_forward_hook(adding)
    return model


def check(found, expected):
    assert found.keys() == expected.keys()
    for name, truth in expected.items():
        error = float((found[name].double() - truth).norm() / truth.norm())
        assert error < 1e-4, (name, error)


FAMILIES = ["llama", "qwen2", "gemma3_text", "gpt_neox", "phi3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_at_once_inputs_are_those_of_the_dense_model(make_model, read, rows, calibrate, family):
    folder = make_model(family)
    calibration = Calibration(sequential=False)
    _, outcomes, used = calibrate(folder, format="int4", method="gptq", calibration=calibration)
    check(used, whole_model_hessians(read(folder), rows, nn.Linear))
    assert len(outcomes) == 2


@pytest.mark.parametrize(
    ("family", "init"), [("llama", None), ("llama", "loftq"), *((f, "cloq") for f in FAMILIES)]
)
def test_sequential_inputs_are_those_of_the_quantized_model(
    make_model, rows, calibrate, family, init
):
    model, outcomes, used = calibrate(make_model(family), init=init, format="nf4", method="gptq")
    finished = finish(model, outcomes)
    check(used, whole_model_hessians(finished, rows, QuantLinear))


def test_codes_are_those_of_the_whole_models_hessians(make_model, read, rows, calibrate):
    folder = make_model()
    settings = {"format": "int3", "method": "gptq", "calibration": Calibration(sequential=False)}
    model, outcomes, _ = calibrate(folder, **settings)
    dense = read(folder)
    for name, hessian in whole_model_hessians(dense, rows, nn.Linear).items():
        layer, weight = model.get_submodule(name), dense.get_submodule(name).weight
        wanted = Wanted(Quant(group_size=16, **settings), None, {})
        expected = fit(name, layer, weight, hessian.float(), wanted).tensors
        found = {k: t for o in outcomes for k, t in o.tensors.items() if k.startswith(f"{name}.")}
        same = sum(int((found[f"{name}.{k}"] == t).sum()) for k, t in expected.items())
        assert same > 0.99 * sum(t.numel() for t in expected.values())


def test_layers_that_share_their_input_share_its_hessian(make_model, calibrate):
    _, _, used = calibrate(make_model(), format="int4", method="gptq")
    tensors = {name: hessian.data_ptr() for name, hessian in used.items()}
    first = {n.rpartition(".")[2]: at for n, at in tensors.items() if ".0." in n}
    assert first["q_proj"] == first["k_proj"] == first["v_proj"] != first["gate_proj"]
    assert first["gate_proj"] == first["up_proj"]
    order = list(first)
    assert order.index("v_proj") < order.index("o_proj") < order.index("up_proj")
    assert order[-1] == "down_proj"


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("shares", [True, False])
def test_layers_of_one_input_can_share_their_factors(make_model, calibrate, shares, sequential):
    calibration = Calibration(sequential=sequential)
    settings = {"format": "int3", "method": "awq", "calibration": calibration}
    model, outcomes, _ = calibrate(make_model(), shares=shares, **settings)
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    attention = finish(model, outcomes).model.layers[0].self_attn
    q, k, v, o = (getattr(attention, name).channel_factors for name in names)
    assert (torch.equal(q, k) and torch.equal(q, v)) == shares
    assert not torch.equal(o, q)


def test_layer_that_does_not_run_takes_the_nearest_codes(make_model, calibrate, monkeypatch):
    def all_but_down(layers, run):
        return [group for group in sharing(layers, run) if "down_proj" not in group[0]]

    monkeypatch.setattr(module, "sharing", all_but_down)
    _, outcomes, used = calibrate(make_model(), format="int4", method="gptq")
    assert used["model.layers.0.mlp.down_proj"] is None
    kinds = {figures.name: figures.method for figures in outcomes[0].figures}
    assert kinds["model.layers.0.mlp.down_proj"] == "nearest"
    assert kinds["model.layers.0.mlp.gate_proj"] == "gptq"


def test_empty_layers_are_left_behind(make_model, calibrate):
    model, outcomes, _ = calibrate(make_model("qwen2"), init="cloq", format="int4")
    for name in {key.rpartition(".")[0] for key in outcomes[0].tensors}:
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantLinear) and not layer._forward_hooks
        assert all(getattr(layer, leaf).is_meta for leaf in layer.tensor_names)
        assert layer.bias is None or not layer.bias.is_meta
