"""`adapter-gguf`: the adapter alone, as llama.cpp takes it beside any GGUF file of the base.

On a base in 16 bits, or in another quantization than that of training, it is not exactly the model
that was trained. What it began with is left out, as in `adapter`.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import get_peft_model_state_dict
from transformers import PreTrainedModel

from qtune.export.consumers import llamacpp
from qtune.export.folder.companions import write_config
from qtune.export.folder.trained import Form, Trained
from qtune.export.gguf_file import check
from qtune.export.gguf_file.base import write_base
from qtune.export.gguf_file.lora import write_lora
from qtune.recipe import Recipe

FILE = "adapter.gguf"


class AdapterGgufExporter:
    """Writes one file with A and B of each layer."""

    consumer = "llama.cpp"
    forms: tuple[Form, ...] = ("merged",)

    def check(self, recipe: Recipe, form: Form = "pair") -> list[str]:
        """llama.cpp must be there, know the model, and has LoRA of linear layers only."""
        lora = recipe.lora
        what = next(
            (
                f"{name} is more than A and B of linear layers; export a merged gguf"
                for name in ("dora", "modules_to_save", "experts")
                if getattr(lora, name)
            ),
            None,
        )
        return check.why_not() + ([f"lora.{what}"] if what else [])

    def quant(self, recipe: Recipe) -> None:
        """None: it is not merged."""

    def size_bytes(self, trained: Trained) -> int:
        """The bytes of A and B in float32, in the file and while it is written."""
        state = get_peft_model_state_dict(trained.model, save_embedding_layers=False)
        size: int = sum(4 * tensor.numel() for tensor in state.values())
        return (4 if trained.start else 2) * size

    def write(self, trained: Trained, folder: Path) -> dict[str, Any]:
        """Write the adapter, and the config.json of the model that it is for."""
        write_config(trained.base_folder, folder, {})
        write_lora(folder / FILE, trained.model, trained.base.config, trained.start)
        return {"form": "adapter"}

    def load(self, folder: Path, base_folder: Path, device: torch.device) -> PreTrainedModel:
        """The adapter on the 16-bit base, which is written as a GGUF file for the while."""
        with TemporaryDirectory(prefix="qtune-gguf-") as place:
            base = Path(place) / "base.gguf"
            write_base(base_folder, base)
            # llama.cpp has the file open from then on
            return llamacpp.load(base, folder, folder / FILE)


EXPORTERS = {"adapter-gguf": AdapterGgufExporter()}
