"""What calibration loads is the dense model, with its matrices kept aside."""

import pytest
import torch
from torch import nn

from qtune.model.calibration.dense import load_dense
from qtune.model.load import load_base
from qtune.model.quant_config import QtuneConfig
from qtune.quant.linear import QuantLinear
from qtune.recipe import Quant
from tests.model.mixtures import save_mixture

CPU = torch.device("cpu")


def load(source, folder, dtype=torch.bfloat16, **config):
    return load_dense(source, QtuneConfig(**config), folder, device=CPU, dtype=dtype)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_matrices_are_aside_and_the_rest_is_there(make_model, read, tmp_path, family):
    folder = make_model(family)
    model, found = read(folder), load(folder, tmp_path / "loaded", dtype=torch.float32)
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)} - {"lm_head"}
    assert found.weights.keys() == linears and not found.experts
    state = model.state_dict()
    for name, weight in found.weights.items():
        assert torch.equal(weight, state[f"{name}.weight"])
    for name, tensor in found.model.state_dict().items():
        if tensor.is_meta:
            assert isinstance(found.model.get_submodule(name.rpartition(".")[0]), QuantLinear)
        else:
            assert torch.equal(tensor, state[name])
    assert found.device == CPU


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_matrix_is_in_memory(make_model, read, tmp_path, dtype):
    folder = make_model(dtype=torch.float32)
    found = load(folder, tmp_path / "loaded", dtype=dtype)
    state = read(folder).state_dict()
    for name, weight in found.weights.items():
        # what lies in memory of its own can grow
        assert not weight.untyped_storage().resizable()
        assert torch.equal(weight, state[f"{name}.weight"].to(dtype))
    assert found.model.model.norm.weight.dtype == dtype
    cast = list((tmp_path / "loaded/matrices").rglob("*.safetensors"))
    assert (sum(path.stat().st_size for path in cast) > 100_000) == (dtype == torch.bfloat16)


def test_experts_are_those_of_nearest(tmp_path):
    folder = save_mixture(tmp_path / "model", "mixtral")
    expected = load_base(folder, Quant(group_size=32), device=CPU).state_dict()
    found = load(folder, tmp_path / "loaded", group_size=32)
    packed = {name for name in expected if "expert_" in name}
    assert found.experts.keys() == packed
    assert not any("experts" in name for name in found.weights)
    with found.experts_of("model.layers.1"):
        state = found.model.state_dict()
        for name in packed:
            assert state[name].is_meta != name.startswith("model.layers.1.")
            assert state[name].is_meta or torch.equal(state[name], expected[name])
    assert all(found.model.state_dict()[name].is_meta for name in packed)


def test_loading_is_as_usual_behind_it(make_model, tmp_path):
    folder = make_model()
    load(folder, tmp_path / "loaded")
    model = load_base(folder, Quant(), device=CPU)
    assert not any(parameter.is_meta for parameter in model.parameters())
