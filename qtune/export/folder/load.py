"""Exported folders as any user of transformers and PEFT would load them."""

from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from qtune.errors import UserError


class NotInstalled(UserError):
    """The library that loads an export is not there: the export may be right, nobody knows."""


def load_model(folder: Path, device: torch.device) -> PreTrainedModel:
    """The model in a folder, in the dtype of its config, ready for evaluation."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", device_map={"": device}
    )
    return model


def load_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """The base with the adapter of a PEFT folder on it, ready for evaluation."""
    model: PeftModel = PeftModel.from_pretrained(base, folder)
    # PEFT's own modules start in training mode
    model.train(False)
    return model


def with_adapter(base: PreTrainedModel, folder: Path) -> PreTrainedModel | PeftModel:
    """The base with the adapter that a pair holds in `adapter/`, if the folder is a pair."""
    inner = folder / "adapter"
    return load_adapter(base, inner) if inner.is_dir() else base
