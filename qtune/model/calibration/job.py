"""Calibration from the first block to the last, and the folder that comes of it.

One block at a time is in memory, dense, with the second moments of its inputs and the hidden states
of the text. Finished blocks are kept on the disk until the folder is whole.
"""

import json
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig

from qtune.cache import need_space
from qtune.data.calibration import Text
from qtune.files import write_text
from qtune.model import start
from qtune.model.calibration.block import Outcome, calibrate_block, dense_block
from qtune.model.calibration.dense import Dense, load_dense
from qtune.model.calibration.enough import shortage
from qtune.model.calibration.fit import Wanted, fit
from qtune.model.calibration.kept import Kept
from qtune.model.calibration.trace import Trace, trace
from qtune.model.checkpoint import stored_tensor, weight_files
from qtune.model.load import add_adapter
from qtune.model.prequantized import MOST_SHARE, SHARD_BYTES, complete, left
from qtune.model.quant_config import QtuneConfig
from qtune.model.shards import Shards
from qtune.model.skeleton import meta_model
from qtune.progress import bar, say
from qtune.quant.linear import QuantLinear
from qtune.recipe import Recipe

FIGURES = "calibration.json"


@dataclass(frozen=True)
class Job:
    """What is to be quantized with which text; `kept` is the folder of finished blocks.

    Layers are stored as `config` says where there is one, and else as the recipe does. With
    `shares` those of one input have the same channel factors, which can then be folded.
    """

    source: Path
    recipe: Recipe
    text: Text
    kept: Path
    device: torch.device
    dtype: torch.dtype
    config: QtuneConfig | None = None
    shares: bool = False

    def run(self, folder: Path) -> None:
        """Fill `folder` with the quantized model, the adapter's start and the figures."""
        size = sum(path.stat().st_size for path in weight_files(self.source))
        # once in blocks, and once in the folder
        need_space(folder, int(2 * MOST_SHARE * size))
        config = self.config or QtuneConfig.of(self.recipe.quant)
        dense = self._dense(config)
        self._warn(dense)
        kept = Kept(self.kept / "finished")
        rest = self._calibrate(dense, kept)
        self._write(folder, dense, kept, rest)
        complete(self.source, folder, config)
        shutil.rmtree(self.kept)

    def _dense(self, config: QtuneConfig) -> Dense:
        return load_dense(
            self.source,
            config,
            self.kept / "loaded",
            device=self.device,
            dtype=self.dtype,
            trust_remote_code=self.recipe.trust_remote_code,
        )

    def _warn(self, dense: Dense) -> None:
        widest = max(weight.shape[1] for weight in dense.weights.values())
        words = shortage(self.text.num_tokens, widest)
        if words is not None:
            say(words)
        if dense.experts:
            say("calibration: weights of experts take the nearest codes, others are calibrated")

    def _calibrate(self, dense: Dense, kept: Kept) -> Outcome:
        """Finish all blocks; what is found for layers outside of them comes back."""
        init = self.recipe.lora.init
        begins = None if init == "zero" else init
        wanted = Wanted(self.recipe.quant, begins, self._ranks(), self.shares)
        found = trace(dense.model, self.text.rows, lambda name: dense_block(dense, name))
        done = kept.num_blocks()
        hidden = kept.hidden(dense.device) if done else found.hidden
        with bar("calibration", len(found.names), done) as progress:
            for name in found.names[done:]:
                outcome = calibrate_block(dense, name, hidden, found.calls[name], wanted)
                kept.add(outcome, hidden)
                progress.advance(words=_told(outcome))
        return _outside(dense, found, wanted)

    def _ranks(self) -> dict[str, int]:
        """The rank of each quantized layer's adapter, by the layer's name; of none at zero."""
        if self.recipe.lora.init == "zero":
            return {}
        options = {"trust_remote_code": self.recipe.trust_remote_code}
        config = AutoConfig.from_pretrained(self.source, **options)
        model = add_adapter(meta_model(config, self.recipe), self.recipe.lora)
        return {
            name: int(layer.r["default"])
            for name, layer in model.get_base_model().named_modules()
            if isinstance(layer, LoraLayer) and isinstance(layer.get_base_layer(), QuantLinear)
        }

    def _write(self, folder: Path, dense: Dense, kept: Kept, outside: Outcome) -> None:
        shards = Shards(folder, SHARD_BYTES)
        for name, tensor in left(dense.model):
            shards.add(name, tensor.cpu())
        for name, tensor in outside.tensors.items():
            shards.add(name, tensor.cpu())
        for name, path in dense.experts.items():
            shards.add(name, stored_tensor(path, name))
        for name, tensor in kept.tensors():
            shards.add(name, tensor)
        shards.finish()
        starts = kept.starts()
        if starts:
            start.write(folder / start.FILE, starts)
        text = json.dumps(self._figures(kept), indent=1, ensure_ascii=False)
        write_text(folder / FIGURES, text + "\n")

    def _figures(self, kept: Kept) -> dict[str, Any]:
        """What calibration.json holds."""
        layers = kept.figures()
        return {
            "text": self.text.source,
            "tokens": self.text.num_tokens,
            "sha256": self.text.sha256,
            "method": self.recipe.quant.method,
            "init": self.recipe.lora.init,
            "formats": dict(Counter(layer["format"] for layer in layers)),
            "seconds": sum(layer["seconds"] for layer in layers),
            "layers": layers,
        }


def _told(outcome: Outcome) -> str:
    """What part of its layers' outputs a block loses; what was odd about them is said."""
    for figures in outcome.figures:
        for note in figures.notes:
            say(f"calibration: {figures.name}: {note}")
    errors = [figures.error for figures in outcome.figures if figures.error is not None]
    return f"lost of outputs {sum(errors) / len(errors):.2%}" if errors else ""


def _outside(dense: Dense, found: Trace, wanted: Wanted) -> Outcome:
    """The nearest codes for layers that are in none of the blocks; it is said where there are."""
    outcome = Outcome()
    for name, weight in dense.weights.items():
        if not any(name.startswith(f"{block}.") for block in found.names):
            layer = dense.model.get_submodule(name)
            assert isinstance(layer, QuantLinear)
            outcome.add(name, fit(name, layer, weight, None, wanted))
            layer.to("meta")
    if outcome.tensors:
        names = ", ".join(figures.name for figures in outcome.figures)
        say(f"calibration: outside of the blocks, so with the nearest codes: {names}")
    return outcome
