"""`compressed-tensors-w4a16`, `-w8a16`, `-w8a8`, `-fp8`: what vLLM loads first of all.

The first two hold the codes of a quantized base, or of merged weights. Their scales are written in
float32, where they are exact, and config.json asks transformers to decode while loading, which is
exact too; vLLM keeps scales in the dtype it runs in, so there only float16 is. The last two
quantize merged weights row by row (`folder/channels.py`), and inputs are rounded when served.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from qtune.export.consumers import compressed_tensors as consumer
from qtune.export.folder import dense, int_base, quantized, vllm_lora
from qtune.export.folder.channels import encoded_bytes, encoded_merge, fp8_channels, int8_channels
from qtune.export.folder.companions import write_config
from qtune.export.folder.compressed_config import packed_config, rows_config
from qtune.export.folder.int_packing import (
    COMPRESSED_TENSORS,
    pack_codes,
    pack_zeros,
    place_scales,
)
from qtune.export.folder.int_weight import int_weight
from qtune.export.folder.kv_scales import kv_scales
from qtune.export.folder.pair import write_beside
from qtune.export.folder.trained import Form, Trained
from qtune.model.shards import write_shards
from qtune.quant.linear import QuantLinear
from qtune.recipe import FormatName, Quant, Recipe

# how the numbers of a row are called in config.json, and what makes them
ROWS = {"int": int8_channels, "float": fp8_channels}


@dataclass(frozen=True)
class PackedExporter:
    """Writes codes of `bits`, several in a word; the first of `formats` is that of merged ones."""

    bits: int
    formats: tuple[FormatName, ...]
    consumer: str = "compressed-tensors"
    forms: tuple[Form, ...] = ("pair", "merged")

    def check(self, recipe: Recipe, form: Form = "pair") -> list[str]:
        """The library that will load it must be there; a pair needs a base of these integers."""
        return _missing() + int_base.why_not(recipe, form, self.formats)

    def quant(self, recipe: Recipe) -> Quant:
        """Integers without zero points, their codes found as the recipe says."""
        return int_base.merged_quant(recipe, self.formats[0])

    def size_bytes(self, trained: Trained) -> int:
        """The bytes of codes, scales, what stays in 16 bits and the adapter."""
        return quantized.quantized_bytes(trained)

    def write(self, trained: Trained, folder: Path) -> dict[str, Any]:
        """Write the weights, config.json and, in the pair form, the adapter."""
        encode = partial(packed_tensors, self.formats)
        codes = quantized.quantized_tensors(trained, encode)
        write_shards(chain(codes, kv_scales(trained)), folder)
        write_beside(trained, folder)
        config = {"quantization_config": packed_config(trained, self.bits)}
        write_config(trained.base_folder, folder, quantized.config_changes(trained) | config)
        # who reads the scales keeps keys and values in 8 bits
        rounds = {"exact": False} if trained.recipe.merge.kv_scales else {}
        return quantized.form_of(trained) | vllm_lora.notes(folder) | rounds

    def load(
        self, folder: Path, base_folder: Path, device: torch.device
    ) -> PreTrainedModel | PeftModel:
        """The model in 16 bits, decoded by the library, with its adapter if there is one."""
        return consumer.load(folder, device)


@dataclass(frozen=True)
class RowsExporter:
    """Writes merged weights in 8 bits of one `kind`, with a scale for each row."""

    kind: Literal["int", "float"]
    consumer: str = "compressed-tensors"
    forms: tuple[Form, ...] = ("merged",)

    def check(self, recipe: Recipe, form: Form = "pair") -> list[str]:
        """The library that will load it must be there."""
        return _missing()

    def quant(self, recipe: Recipe) -> None:
        """None: rows are quantized as they are written, from 16 bits."""

    def size_bytes(self, trained: Trained) -> int:
        """The bytes of codes and of what stays in 16 bits."""
        return encoded_bytes(trained)

    def write(self, trained: Trained, folder: Path) -> dict[str, Any]:
        """Write the weights and config.json."""
        codes = encoded_merge(trained, partial(rows_tensors, self.kind))
        write_shards(chain(codes, kv_scales(trained)), folder)
        changes = dense.dense_config(trained, dense.dense_dtype(trained))
        config = {"quantization_config": rows_config(trained, self.kind)}
        write_config(trained.base_folder, folder, changes | config)
        return dense.form_of(trained)

    def load(
        self, folder: Path, base_folder: Path, device: torch.device
    ) -> PreTrainedModel | PeftModel:
        """The model in 16 bits, whose inputs the library rounds as a server does."""
        return consumer.load(folder, device)


def packed_tensors(
    formats: tuple[FormatName, ...], prefix: str, layer: QuantLinear
) -> Iterator[tuple[str, Tensor]]:
    """The entries of one layer of codes, whose name with the dot is `prefix`.

    Raises UserError for a layer that the container cannot hold.
    """
    weight = int_weight(prefix.removesuffix("."), layer, formats)
    codes, zeros = weight.codes, weight.zeros
    yield f"{prefix}weight_packed", pack_codes(codes, weight.bits, COMPRESSED_TENSORS)
    yield f"{prefix}weight_scale", place_scales(weight.scales, COMPRESSED_TENSORS)
    yield f"{prefix}weight_shape", torch.tensor(layer.shape)
    if layer.storage.zero_kind is not None:
        packed = pack_zeros(zeros, weight.bits, COMPRESSED_TENSORS)
        yield f"{prefix}weight_zero_point", packed


def rows_tensors(
    kind: Literal["int", "float"], prefix: str, weight: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """The entries of one layer, whose name with the dot is `prefix`, with a weight [O, I]."""
    codes, scales = ROWS[kind](weight)
    yield f"{prefix}weight", codes
    yield f"{prefix}weight_scale", scales


def _missing() -> list[str]:
    return [f"{consumer.MISSING}, or leave this export out"] if consumer.is_missing() else []


EXPORTERS = {
    "compressed-tensors-w4a16": PackedExporter(4, ("int4_sym", "int4")),
    "compressed-tensors-w8a16": PackedExporter(8, ("int8",)),
    "compressed-tensors-w8a8": RowsExporter("int"),
    "compressed-tensors-fp8": RowsExporter("float"),
}
