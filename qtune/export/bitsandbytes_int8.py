"""`bitsandbytes-int8`: a pre-quantized folder for LLM.int8() (arXiv 2208.07339).

Each row of a merged weight has one scale, its largest magnitude in float32, as bitsandbytes itself
computes it. Served, inputs are rounded to 8 bits too, except those above its threshold.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qtune.export.bitsandbytes import MISSING
from qtune.export.folder.channels import LARGEST_INT8, encoded_bytes, encoded_merge
from qtune.export.folder.companions import write_config
from qtune.export.folder.dense import dense_config, dense_dtype, form_of
from qtune.export.folder.load import NotInstalled, load_model
from qtune.export.folder.quantized import dense_linears
from qtune.export.folder.trained import Form, Trained
from qtune.model.shards import write_shards
from qtune.recipe import Recipe

# inputs of that size stay in 16 bits: the value of the paper and of transformers
THRESHOLD = 6.0


class BitsandbytesInt8Exporter:
    """Writes int8 codes and the largest magnitude of each row."""

    consumer = "bitsandbytes"
    forms: tuple[Form, ...] = ("merged",)

    def check(self, recipe: Recipe, form: Form = "pair") -> list[str]:
        """The library that will load it must be there."""
        missing = find_spec("bitsandbytes") is None
        return [f"{MISSING}, or leave this export out"] if missing else []

    def quant(self, recipe: Recipe) -> None:
        """None: rows are quantized as they are written, from 16 bits."""

    def size_bytes(self, trained: Trained) -> int:
        """The bytes of codes and of what stays in 16 bits."""
        return encoded_bytes(trained)

    def write(self, trained: Trained, folder: Path) -> dict[str, Any]:
        """Write the weights and config.json."""
        write_shards(encoded_merge(trained, layer_tensors), folder)
        changes = dense_config(trained, dense_dtype(trained))
        config = {"quantization_config": _quant_config(trained)}
        write_config(trained.base_folder, folder, changes | config)
        return form_of(trained)

    def load(self, folder: Path, base_folder: Path, device: torch.device) -> PreTrainedModel:
        """The model on bitsandbytes' layers; raises NotInstalled."""
        if find_spec("bitsandbytes") is None:
            raise NotInstalled(MISSING)
        return load_model(folder, device)


def layer_tensors(prefix: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The entries of one layer, whose name with the dot is `prefix`, with a weight [O, I]."""
    weight = weight.float()
    largest = weight.abs().amax(1)
    steps = LARGEST_INT8 / largest.where(largest > 0, 1)
    yield f"{prefix}weight", (weight * steps.unsqueeze(1)).round().to(torch.int8)
    yield f"{prefix}SCB", largest
    # rows, the only order that is left of several
    yield f"{prefix}weight_format", torch.tensor(0, dtype=torch.uint8)


def _quant_config(trained: Trained) -> dict[str, Any]:
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": False,
        "load_in_8bit": True,
        "llm_int8_threshold": THRESHOLD,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": dense_linears(trained),
    }


EXPORTERS = {"bitsandbytes-int8": BitsandbytesInt8Exporter()}
