"""`adapter`: a plain PEFT folder, which loads onto the original 16-bit model without qtune.

On that base it is not exactly the model that was trained, whose base was quantized: the table of a
run says what the difference costs. An adapter that began by making up for the quantization of its
base is written without that start, at twice the rank. Embeddings are written only where they were
trained.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from qtune.export.folder import vllm_lora
from qtune.export.folder.load import load_adapter, load_model
from qtune.export.folder.trained import Form, Trained
from qtune.model.merge import NO_START
from qtune.model.scales import NAME as TRAINED_SCALES
from qtune.model.start import Start, difference
from qtune.recipe import Recipe


class AdapterExporter:
    """Writes adapter_config.json and adapter_model.safetensors."""

    consumer = "peft"
    forms: tuple[Form, ...] = ("merged",)

    def check(self, recipe: Recipe, form: Form = "pair") -> list[str]:
        """Nothing: every run has an adapter."""
        return []

    def quant(self, recipe: Recipe) -> None:
        """None: it is not merged."""

    def size_bytes(self, trained: Trained) -> int:
        """The bytes of the adapter's tensors."""
        state = get_peft_model_state_dict(trained.model, save_embedding_layers=False)
        size: int = sum(tensor.nbytes for tensor in state.values())
        return 2 * size if trained.start else size

    def write(self, trained: Trained, folder: Path) -> dict[str, Any]:
        """Write the adapter."""
        base, revision = base_name(trained), trained.recipe.revision
        write_adapter(trained.model, folder, base, revision, start=trained.start)
        return {"form": "adapter"} | vllm_lora.notes(folder)

    def load(self, folder: Path, base_folder: Path, device: torch.device) -> PeftModel:
        """The adapter on the 16-bit base, as PEFT loads it."""
        return load_adapter(load_model(base_folder, device), folder)


def write_adapter(
    model: PeftModel,
    folder: Path,
    base: str,
    revision: str | None,
    tensors: dict[str, Tensor] | None = None,
    start: Start = NO_START,
) -> None:
    """Write the active adapter as a PEFT folder that names `base` as its base model.

    `tensors` are the trained parameters by name, where the model holds only a part of each. What
    the adapter began with, `start`, is left out of what it does.
    """
    state = get_peft_model_state_dict(model, state_dict=tensors, save_embedding_layers=False)
    # PEFT takes all that is on its layers for its own
    state = {name: tensor for name, tensor in state.items() if f".{TRAINED_SCALES}." not in name}
    config = copy.copy(model.active_peft_config)
    if start:
        state, changes = difference(model, state, start)
        for field, value in changes.items():
            setattr(config, field, value)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    if Path(base).expanduser().is_dir():
        base = str(Path(base).expanduser().absolute())
    config.base_model_name_or_path, config.revision, config.inference_mode = base, revision, True
    config.save_pretrained(folder)


def has_tensors(model: PeftModel) -> bool:
    """Whether an adapter has anything that `write_adapter` would write."""
    return bool(get_peft_model_state_dict(model, save_embedding_layers=False))


def base_name(trained: Trained) -> str:
    """What PEFT loads the base from: the recipe's model, or the folder made of its file."""
    model = trained.recipe.model
    made_of_file = Path(model).expanduser().is_file() or model.startswith("pypi:")
    return str(trained.base_folder) if made_of_file else model


EXPORTERS = {"adapter": AdapterExporter()}
