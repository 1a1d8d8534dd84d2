"""The recipe's model without weights: its layers as they will be stored, on the meta device.

Plans count its bytes, and calibration asks it which layers get an adapter.
"""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from qtune.model.load import make_ready, register
from qtune.model.quant_config import QtuneConfig
from qtune.model.quantizer import quantized_on_meta
from qtune.recipe import Recipe


def meta_model(config: Any, recipe: Recipe) -> PreTrainedModel:
    """The base model of the run on the meta device, its layers as they will be stored."""
    register()
    model: PreTrainedModel
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=torch.bfloat16,
            trust_remote_code=recipe.trust_remote_code,
        )
    make_ready(model)
    if recipe.quant.format is not None:
        quantized_on_meta(model, QtuneConfig.of(recipe.quant))
    model.requires_grad_(False)
    return model
