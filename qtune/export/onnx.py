"""`onnx`: the trained model as a graph for ONNX Runtime and onnxruntime-genai.

A pair is one graph: the codes that were trained on, and the adapter as two small products beside
each layer, which makes it exactly the trained model but for rounding. In the merged form codes are
4-bit integers, found after the merge.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig

from qtune.errors import UserError
from qtune.export.folder.companions import generation_config, write_config, write_json
from qtune.export.folder.load import NotInstalled
from qtune.export.folder.quantized import config_changes, form_of, quantized_bytes
from qtune.export.folder.trained import Form, Trained
from qtune.recipe import Quant, Recipe

if TYPE_CHECKING:
    from qtune.export.consumers.onnx import OnnxModel

FORMATS = ("nf4", "fp4", "int8", "int4", "int4_sym", "int2", "int2_sym")
# weights that share a scale; and the size that most models have whole rows of
GROUP_SIZES, USUAL_GROUP = (16, 32, 64, 128, 256), 64


class OnnxExporter:
    """Writes model.onnx with its weights, config.json and genai_config.json."""

    consumer = "onnxruntime"
    forms: tuple[Form, ...] = ("pair", "merged")

    def check(self, recipe: Recipe, form: Form = "pair") -> list[str]:
        """The libraries that write and load it must be there; a pair needs a base it can hold."""
        missing = [name for name in ("onnx", "onnxruntime") if find_spec(name) is None]
        if missing:
            return [f"{' and '.join(missing)} missing: pip install qtune[onnx], or leave it out"]
        problems = _other_model(recipe)
        return problems if form == "merged" else problems + _unknown(recipe)

    def quant(self, recipe: Recipe) -> Quant:
        """4-bit integers with zero points."""
        size = recipe.quant.group_size
        return Quant(
            format="int4",
            group_size=size if size in GROUP_SIZES else USUAL_GROUP,
            skip=recipe.quant.skip,
            method=recipe.merge.method,
            calibration=recipe.quant.calibration,
        )

    def size_bytes(self, trained: Trained) -> int:
        """The bytes of codes, scales, what stays in 16 bits and the adapter."""
        return quantized_bytes(trained)

    def write(self, trained: Trained, folder: Path) -> dict[str, Any]:
        """Write the graph and what goes with it."""
        from qtune.export.onnx_graph import decoder, genai, graph

        decoder.check(trained.base.config)
        with (folder / graph.DATA).open("wb") as data, torch.no_grad():
            made = graph.Graph(data)
            decoder.add_decoder(made, trained.base)
            made.save(folder)
        write_config(trained.base_folder, folder, config_changes(trained))
        generation = generation_config(trained.base_folder, trained.tokenizer)
        settings = genai.genai_config(trained.base.config, generation)
        write_json(folder / genai.NAME, settings)
        return form_of(trained)

    def load(self, folder: Path, base_folder: Path, device: torch.device) -> "OnnxModel":
        """The graph in ONNX Runtime, on the CPU."""
        if find_spec("onnxruntime") is None:
            raise NotInstalled("onnxruntime, which loads the export, is missing: pip install it")
        from qtune.export.consumers import onnx

        return onnx.load(folder)


def _other_model(recipe: Recipe) -> list[str]:
    """Why the graph is not that of the model, if its folder is there to tell."""
    from qtune.export.onnx_graph.decoder import check

    folder, options = (
        Path(recipe.model).expanduser(),
        {"trust_remote_code": recipe.trust_remote_code},
    )
    if (folder / "config.json").is_file():
        try:
            check(AutoConfig.from_pretrained(folder, **options))
        except UserError as error:
            return [str(error)]
    return []


def _unknown(recipe: Recipe) -> list[str]:
    """The first thing of the recipe's base, or adapter, that the graph has no words for, if any."""
    quant = recipe.quant
    others = {quant.format, *quant.layers.values()} - set(FORMATS)
    sizes, formats = ", ".join(map(str, GROUP_SIZES)), ", ".join(FORMATS)
    problems = [
        (
            bool(others),
            f"it holds {formats}, and not {', '.join(str(name or 'null') for name in others)}",
        ),
        (
            quant.group_size not in GROUP_SIZES,
            f"quant.group_size {quant.group_size} is not one of {sizes}; take {USUAL_GROUP}",
        ),
        (quant.rotate, "it has no rotation; set quant.rotate: false"),
        (quant.method == "awq", "it has no channel factors; set quant.method: gptq"),
        (recipe.lora.dora, "it has no DoRA; set lora.dora: false"),
    ]
    found = [f"{text}, or export the merged form" for is_there, text in problems if is_there]
    return found[:1]


EXPORTERS = {"onnx": OnnxExporter()}
