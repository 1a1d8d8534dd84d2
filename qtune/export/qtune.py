"""`qtune`: our own quantized folder in any format, for `from_pretrained` after `import qtune`."""

from collections.abc import Iterator
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
from qtune.model.quantizer import QtuneConfig
from qtune.quant.linear import TENSORS, QuantLinear
from qtune.recipe import Recipe

# what a merged model is quantized to where the run's base was not quantized
DEFAULT_FORMAT = "nf4"


class QtuneExporter:
    """Writes the tensors of each QuantLinear under their own names."""

    consumer = "qtune"

    def check(self, recipe: Recipe, form: Form = "pair") -> list[str]:
        """A pair needs a quantized base."""
        if form == "merged" or recipe.quant.format is not None:
            return []
        return [
            "quant.format is null, so there is no quantized base; export bf16 or the merged form"
        ]

    def size_bytes(self, trained: Trained) -> int:
        """The bytes of codes, scales, what stays in 16 bits and the adapter."""
        return quantized_bytes(trained)

    def write(self, trained: Trained, folder: Path) -> dict[str, Any]:
        """Write the weights, config.json and, in the pair form, the adapter."""
        quant = _quant_config(trained)
        write_quantized(trained, folder, _own_tensors, quant.format, quant.group_size)
        changes = config_changes(trained) | {"quantization_config": _plain(quant)}
        write_config(trained.base_folder, folder, changes)
        return form_of(trained)

    def load(
        self, folder: Path, base_folder: Path, device: torch.device
    ) -> PreTrainedModel | PeftModel:
        """The quantized model, with its adapter if there is one."""
        register()
        return with_adapter(load_model(folder, device), folder)


def _own_tensors(prefix: str, layer: QuantLinear) -> Iterator[tuple[str, Tensor]]:
    for leaf in TENSORS:
        yield prefix + leaf, getattr(layer, leaf).detach().cpu()


def _quant_config(trained: Trained) -> QtuneConfig:
    """The configuration that the base was loaded with, or the recipe's where it is in 16 bits."""
    loaded = getattr(trained.base.config, "quantization_config", None)
    if isinstance(loaded, QtuneConfig):
        return loaded
    quant = trained.recipe.quant
    return QtuneConfig(quant.format or DEFAULT_FORMAT, quant.group_size, list(quant.skip))


def _plain(config: QtuneConfig) -> dict[str, Any]:
    return {
        "quant_method": "qtune",
        "format": config.format,
        "group_size": config.group_size,
        "skip": config.skip,
    }


EXPORTER = QtuneExporter()
