from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from qtune.errors import UserError
from qtune.model.load import load_base, register
from qtune.planning.sizes import sizes
from qtune.quant.linear import QuantLinear
from qtune.recipe import Quant

FORMS = {
    "16-bit": Quant(format=None),
    "nf4": Quant(),
    "int8": Quant(format="int8"),
    "int4": Quant(format="int4", group_size=32),
    "int2 rows": Quant(format="int2", group_size="row"),
    "mixed": Quant(format="int4", layers={"down_proj": "int3", "layers.1": "int8"}),
    "skipping": Quant(format="int3", skip=("lm_head", "k_proj")),
}


@pytest.fixture(autouse=True)
def registered():
    register()


@pytest.mark.parametrize("name", FORMS)
def test_bytes_are_those_of_the_loaded_model(tiny_model, name):
    quant = FORMS[name]
    found = sizes(AutoConfig.from_pretrained(tiny_model), quant)
    model = load_base(Path(tiny_model), quant, device=torch.device("cpu"))
    assert found.total_bytes == sum(p.nbytes for p in model.parameters())
    for layer, (num, size) in found.layers.items():
        module = model.get_submodule(layer)
        assert num == module.in_features * module.out_features
        assert size == sum(p.nbytes for p in module.parameters())
    if quant.format is not None:
        layers = {n for n, m in model.named_modules() if isinstance(m, QuantLinear)}
        assert set(found.layers) == layers


def test_bits_are_counted_with_scales_and_with_embeddings(tiny_model):
    config = AutoConfig.from_pretrained(tiny_model)
    dense = sizes(config, Quant(format=None))
    assert (dense.bits, dense.model_bits) == (16, 16)
    nf4 = sizes(config, Quant())
    # a code of 8 bits for each 64 weights, and 8 bytes for a matrix of few groups
    assert nf4.bits == pytest.approx(4 + 8 / 64 + 8 * 8 * len(nf4.layers) / nf4.layer_weights)
    assert nf4.num_parameters == dense.num_parameters
    embeddings = dense.num_parameters - dense.layer_weights
    whole = (nf4.bits * nf4.layer_weights + 16 * embeddings) / dense.num_parameters
    assert nf4.model_bits == pytest.approx(whole)


def test_a_form_that_suits_no_layer_is_refused(tiny_model):
    with pytest.raises(UserError, match="group_size"):
        sizes(AutoConfig.from_pretrained(tiny_model), Quant(group_size=1024))
