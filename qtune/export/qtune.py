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
from qtune.model.quant_config import QtuneConfig
from qtune.quant.linear import QuantLinear
from qtune.recipe import FormatName, Quant, Recipe

# what a merged model is quantized to where the run's base was not quantized
DEFAULT_FORMAT: FormatName = "nf4"


class QtuneExporter:
    """Writes the tensors of each QuantLinear under their own names."""

    consumer = "qtune"

    def check(self, recipe: Recipe, form: Form = "pair") -> list[str]:
        """A pair needs a quantized base, the merged form a format that needs no calibration."""
        if form == "merged" and "e8p" in (recipe.quant.format, *recipe.quant.layers.values()):
            return ["e8p needs calibration, which the merged form has not; export the pair"]
        if form == "merged" or recipe.quant.format is not None:
            return []
        return [
            "quant.format is null, so there is no quantized base; export bf16 or the merged form"
        ]

    def quant(self, recipe: Recipe) -> Quant:
        """That of the base; NF4 where it is in 16 bits."""
        quant = recipe.quant
        return quant if quant.format else replace(quant, format=DEFAULT_FORMAT)

    def size_bytes(self, trained: Trained) -> int:
        """The bytes of codes, scales, what stays in 16 bits and the adapter."""
        return quantized_bytes(trained)

    def write(self, trained: Trained, folder: Path) -> dict[str, Any]:
        """Write the weights, config.json and, in the pair form, the adapter."""
        quant = _quant_config(trained)
        write_quantized(trained, folder, _own_tensors, quant.storage)
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


def _quant_config(trained: Trained) -> QtuneConfig:
    """The configuration that the base was loaded with, or the recipe's where it is in 16 bits."""
    loaded = getattr(trained.base.config, "quantization_config", None)
    if not isinstance(loaded, QtuneConfig):
        quant = trained.recipe.quant
        loaded = QtuneConfig(quant.format or DEFAULT_FORMAT, quant.group_size, list(quant.skip))
    return _for_nearest(loaded) if trained.form == "merged" else loaded


def _for_nearest(config: QtuneConfig) -> QtuneConfig:
    """The same formats without what is of use to calibrated codes only."""
    calibrated = {"rotate": False, "channels": False}
    own = {"rotated", "channels"}
    layers = {
        name: {key: value for key, value in fields.items() if key not in own}
        for name, fields in config.layers.items()
    }
    return QtuneConfig(**config.to_dict() | calibrated | {"layers": layers})


EXPORTERS = {"qtune": QtuneExporter()}
