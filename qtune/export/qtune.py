"""`qtune`: our own quantized folder in any format, for `from_pretrained` after `import qtune`."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from qtune.export.folder.companions import write_config
from qtune.export.folder.load import load_model, with_adapter
from qtune.export.folder.quantized import (
    config_changes,
    form_of,
    quantized_bytes,
    write_quantized,
)
from qtune.export.folder.trained import Form, Trained
from qtune.model.load import register
from qtune.quant.linear import QuantLinear
from qtune.recipe import FormatName, Quant, Recipe

# what a merged model is quantized to where the run's base was not quantized
DEFAULT_FORMAT: FormatName = "nf4"


class QtuneExporter:
    """Writes the tensors of each QuantLinear under their own names."""

    consumer = "qtune"
    forms: tuple[Form, ...] = ("pair", "merged")

    def check(self, recipe: Recipe, form: Form = "pair") -> list[str]:
        """A pair needs a quantized base, and e8p in the merged form a method that can find it."""
        if form == "merged" and recipe.quant.format == "e8p" and recipe.merge.method != "gptq":
            return ["e8p needs merge.method: gptq"]
        if form == "merged" or recipe.quant.format is not None:
            return []
        return [
            "quant.format is null, so there is no quantized base; export bf16 or the merged form"
        ]

    def quant(self, recipe: Recipe) -> Quant:
        """The recipe's own formats, NF4 where its base is in 16 bits."""
        quant, method = recipe.quant, recipe.merge.method
        return replace(
            quant,
            format=quant.format or DEFAULT_FORMAT,
            method=method,
            rotate=quant.rotate and method == "gptq",
        )

    def size_bytes(self, trained: Trained) -> int:
        """The bytes of codes, scales, what stays in 16 bits and the adapter."""
        return quantized_bytes(trained)

    def write(self, trained: Trained, folder: Path) -> dict[str, Any]:
        """Write the weights, config.json and the adapter, where there is one."""
        write_quantized(trained, folder, _own_tensors)
        quant = trained.base.config.quantization_config
        changes = config_changes(trained) | {"quantization_config": quant.to_dict()}
        write_config(trained.base_folder, folder, changes)
        return form_of(trained)

    def load(
        self, folder: Path, base_folder: Path, device: torch.device
    ) -> PreTrainedModel | PeftModel:
        """The quantized model, with its adapter if there is one."""
        register()
        return with_adapter(load_model(folder, device), folder)


def _own_tensors(prefix: str, layer: QuantLinear) -> Iterator[tuple[str, Tensor]]:
    for leaf in layer.tensor_names:
        yield prefix + leaf, getattr(layer, leaf).detach().cpu()


EXPORTERS = {"qtune": QtuneExporter()}
