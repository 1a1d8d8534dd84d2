"""The model on meta has the layers that loading makes, byte for byte in size."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from qtune.data.calibration import Text
from qtune.model.calibrated import calibrated_folder, is_calibrated
from qtune.model.load import load_base
from qtune.model.skeleton import meta_model

QUANTS = [
    {},
    {"format": None},
    {"format": "int4", "method": "gptq", "rotate": True, "layers": {"down_proj": "int2"}},
    {"format": "int4", "method": "awq", "group_size": 32},
    {"format": "e8p", "method": "gptq", "layers": {"q_proj": "int4"}},
]


@pytest.mark.parametrize("quant", QUANTS)
def test_same_parameters_as_loading_makes(tiny_recipe, quant):
    recipe = tiny_recipe(quant=quant)
    folder = Path(recipe.model)
    planned = meta_model(AutoConfig.from_pretrained(folder), recipe)
    text = Text([list(range(3, 90))], "rows")
    cpu = torch.device("cpu")
    if is_calibrated(recipe):
        folder = calibrated_folder(folder, recipe, lambda: text, device=cpu)
    loaded = load_base(folder, recipe.quant, device=cpu)
    facts = [{n: (p.shape, p.dtype) for n, p in m.named_parameters()} for m in (planned, loaded)]
    assert facts[0] == facts[1]
    assert all(p.is_meta and not p.requires_grad for p in planned.parameters())
