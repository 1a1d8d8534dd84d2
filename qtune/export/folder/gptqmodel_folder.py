"""Folders of integers that transformers loads with gptqmodel: what GPTQ's and AWQ's have in common.

They differ in how they pack a layer and in what config.json says; writing and loading are the same.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from qtune.export.consumers import gptqmodel
from qtune.export.folder import vllm_lora
from qtune.export.folder.companions import write_config
from qtune.export.folder.quantized import (
    config_changes,
    form_of,
    quantized_bytes,
    write_quantized,
)
from qtune.export.folder.trained import Form, Trained
from qtune.quant.linear import QuantLinear


class GptqmodelFolder(ABC):
    """Writes layers and config.json as its subclass packs and describes them."""

    consumer = "gptqmodel"
    forms: tuple[Form, ...] = ("pair", "merged")

    @abstractmethod
    def layer_tensors(self, prefix: str, layer: QuantLinear) -> Iterator[tuple[str, Tensor]]:
        """The entries of one layer, whose name with the dot is `prefix`, in the checkpoint.

        Raises UserError for a layer that the layout cannot hold.
        """

    @abstractmethod
    def quant_config(self, trained: Trained) -> dict[str, Any]:
        """What config.json says of the quantization."""

    def size_bytes(self, trained: Trained) -> int:
        """The bytes of codes, scales, what stays in 16 bits and the adapter."""
        return quantized_bytes(trained)

    def write(self, trained: Trained, folder: Path) -> dict[str, Any]:
        """Write the weights, config.json and, in the pair form, the adapter."""
        write_quantized(trained, folder, self.layer_tensors)
        config = {"quantization_config": self.quant_config(trained)}
        write_config(trained.base_folder, folder, config_changes(trained) | config)
        return form_of(trained) | vllm_lora.notes(folder)

    def load(
        self, folder: Path, base_folder: Path, device: torch.device
    ) -> PreTrainedModel | PeftModel:
        """The model on gptqmodel's layers, with its adapter if there is one."""
        return gptqmodel.load(folder, device)
