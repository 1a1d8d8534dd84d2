"""`gguf-f16`, `gguf-q8_0` and so on: one file that llama.cpp and what is built on it load.

The merged weights are encoded in one step. Types of 8 bits and more are made of what the run merges
onto; those of fewer of the original weights, for a second rounding of rounded weights would lose
the adapter. An int8 base is Q8_0 as it stands: with the adapter in a file beside it, it is the
model that was trained.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from qtune.export.adapter import has_tensors
from qtune.export.consumers import llamacpp
from qtune.export.folder import int_base
from qtune.export.folder.companions import generation_config, write_config
from qtune.export.folder.dense import dense_bytes, dense_config, dense_dtype, dense_tensors
from qtune.export.folder.trained import Form, Trained
from qtune.export.gguf_file import check
from qtune.export.gguf_file.importance import importance
from qtune.export.gguf_file.lora import write_lora
from qtune.export.gguf_file.mixes import MIXES
from qtune.export.gguf_file.pair import pair_tensors
from qtune.export.gguf_file.write import Described, write_model
from qtune.model.checkpoint import Names
from qtune.model.merge import untied
from qtune.recipe import Recipe

FILE, ADAPTER = "model.gguf", "adapter/adapter.gguf"
# of so many bits that merging onto rounded weights loses nothing
_FINE = ("f16", "q8_0")


@dataclass(frozen=True)
class GgufExporter:
    """Writes one file of the mix called `mix`."""

    mix: str
    forms: tuple[Form, ...] = ("merged",)
    consumer: str = "llama.cpp"

    def check(self, recipe: Recipe, form: Form = "pair") -> list[str]:
        """llama.cpp must be there, and must know the model; a pair needs an int8 base."""
        problems = check.why_not()
        if form == "pair":
            return problems + int_base.why_not(recipe, form, ("int8",))
        if self.mix not in _FINE and (recipe.adapter != "lora" or recipe.train.merge_aware):
            problems.append(
                "what was trained belongs to codes of the base, and a second rounding would lose "
                "it; export gguf-q8_0 with merge.base: dequantized"
            )
        return problems

    def quant(self, recipe: Recipe) -> None:
        """None: the types of GGUF files are its own."""

    def size_bytes(self, trained: Trained) -> int:
        """At most the bytes of the file; for a while its tensors are there twice."""
        return 2 * dense_bytes(trained)

    def write(self, trained: Trained, folder: Path) -> dict[str, Any]:
        """Write the file, its adapter in the pair form, and the config.json of the base."""
        if trained.form == "pair":
            return self._write_pair(trained, folder)
        onto = trained.onto if self.mix in _FINE else "original"
        source, names = replace(trained, onto=onto), Names.of(trained.base)
        worth = {}
        if trained.text is not None and self.mix not in _FINE:
            worth = importance(trained.model, trained.text())
        # encoders round: merged weights are not to be rounded before
        merged = dense_tensors(source, torch.float32)
        tensors = ((names.in_model(stored), tensor) for stored, tensor in merged)
        write_config(trained.base_folder, folder, dense_config(trained, dense_dtype(trained)))
        described = _described(trained, tied=not untied(trained.model))
        write_model(folder / FILE, tensors, described, MIXES[self.mix], worth)
        return {"form": "merged", "onto": onto, "importance": bool(worth)}

    def load(self, folder: Path, base_folder: Path, device: torch.device) -> PreTrainedModel:
        """The file in llama.cpp, with its adapter if there is one."""
        adapter = folder / ADAPTER
        return llamacpp.load(folder / FILE, folder, adapter if adapter.is_file() else None)

    def _write_pair(self, trained: Trained, folder: Path) -> dict[str, Any]:
        write_config(trained.base_folder, folder, {})
        described = _described(trained)
        write_model(folder / FILE, pair_tensors(trained), described, MIXES[self.mix])
        if has_tensors(trained.model):
            (folder / ADAPTER).parent.mkdir()
            write_lora(folder / ADAPTER, trained.model, described.config)
        return {"form": "pair"}


def _described(trained: Trained, *, tied: bool = True) -> Described:
    stops = generation_config(trained.base_folder, trained.tokenizer)["eos_token_id"]
    return Described(
        Path(trained.recipe.model).name,
        trained.base.config,
        trained.tokenizer,
        stops if isinstance(stops, list) else [stops],
        tied=tied and trained.base.config.tie_word_embeddings,
    )


EXPORTERS = {
    f"gguf-{mix}": GgufExporter(mix, ("pair", "merged") if mix == "q8_0" else ("merged",))
    for mix in MIXES
}
