"""One GGUF file with a whole model, written tensor by tensor.

A GGUF file begins with the sizes of all tensors, which are not known before the last one is made,
so encoded tensors wait in a second file beside it: for a while twice the room is needed.
"""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qtune.errors import UserError
from qtune.export.gguf_file.families import TensorNames
from qtune.export.gguf_file.hyperparameters import add_hyperparameters
from qtune.export.gguf_file.mixes import Mix, Shape, kind_of
from qtune.export.gguf_file.rope import rope_tensors
from qtune.export.gguf_file.tokenizer import add_tokenizer
from qtune.quant.kquants.encoder import encode

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gguf import GGUFWriter


@dataclass(frozen=True)
class Encoded:
    """A matrix that is in the bytes of a GGUF type already: uint8 [O, bytes of a row]."""

    data: Tensor
    kind: str


@dataclass(frozen=True)
class Described:
    """What a file says of the model beside its weights."""

    name: str
    config: Any
    tokenizer: PreTrainedTokenizerBase
    stops: Sequence[int]
    tied: bool


def write_model(
    path: Path,
    tensors: Iterable[tuple[str, Tensor | Encoded]],
    described: Described,
    mix: Mix,
    importance: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the tensors, by their names in transformers, into one file of the types of `mix`.

    `importance` is the mean square of each input [I] of the matrix of that name. Raises UserError
    for a model or tokenizer that llama.cpp has not.
    """
    names, importance = TensorNames(described.config), importance or {}
    shape = _shape(described)
    with opened(path, names.family.architecture) as writer:
        _add_metadata(writer, described, mix)
        for name, values in rope_tensors(described.config):
            writer.add_tensor(name, values.numpy())
        for parameter, tensor in tensors:
            name = names.name(parameter)
            if isinstance(tensor, Encoded):
                data = names.value(parameter, tensor.data)
                add_encoded(writer, name, Encoded(data, tensor.kind))
                continue
            kind = kind_of(name, tuple(tensor.shape), mix, shape)
            value = names.value(parameter, tensor)
            add_tensor(writer, name, value, kind, importance.get(parameter))


@contextmanager
def opened(path: Path, architecture: str) -> "Iterator[GGUFWriter]":
    """A writer whose file is whole at the end. Tensors are kept beside it meanwhile."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, architecture, use_temp_file=True)
    with tempfile.SpooledTemporaryFile(max_size=1, dir=str(path.parent)) as kept:
        writer.temp_file = kept
        try:
            yield writer
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def add_tensor(
    writer: "GGUFWriter", name: str, tensor: Tensor, kind: str, importance: Tensor | None = None
) -> None:
    """Add a tensor as one of GGUF's types; UserError where that cannot hold it."""
    if kind == "F16" and tensor.abs().max() > torch.finfo(torch.float16).max:
        raise UserError(
            f"{name} has weights beyond the largest float16, which llama.cpp computes in; export "
            "gguf-q8_0 or bf16"
        )
    rows = tensor.reshape(-1, tensor.shape[-1])
    data = encode(rows, kind, importance)
    add_encoded(writer, name, Encoded(data.view(*tensor.shape[:-1], -1), kind))


def add_encoded(writer: "GGUFWriter", name: str, tensor: Encoded) -> None:
    """Add a tensor that is encoded already."""
    from gguf import GGMLQuantizationType

    kind = getattr(GGMLQuantizationType, tensor.kind)
    writer.add_tensor(name, tensor.data.cpu().numpy(), raw_dtype=kind)


def _add_metadata(writer: "GGUFWriter", described: Described, mix: Mix) -> None:
    from gguf import GGML_QUANT_VERSION

    writer.add_type("model")
    writer.add_name(described.name)
    writer.add_file_type(mix.file_type)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    add_hyperparameters(writer, described.config)
    size = described.config.vocab_size
    add_tokenizer(writer, described.tokenizer, size, described.stops)


def _shape(described: Described) -> Shape:
    config = described.config
    heads_per_key = config.num_attention_heads // config.num_key_value_heads
    return Shape(config.num_hidden_layers, heads_per_key, described.tied)
