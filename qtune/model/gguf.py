"""A GGUF file as a transformers folder: bf16 safetensors, config, tokenizer, generation config.

The three architectures whose layout is known here (llama, qwen2, qwen3) are converted tensor by
tensor, so memory holds one shard and never the model; the result is checked against the names and
shapes of the transformers model built on `meta`. Weights are what `gguf.quants.dequantize` gives,
rounded once to bf16, with the row order of llama's q and k undone. Other architectures go through
transformers' loader.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qtune.cache import need_space
from qtune.errors import UserError
from qtune.model.gguf_config import generation_config, model_config
from qtune.model.gguf_tokenizer import write_tokenizer

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader, ReaderTensor
    from transformers import PretrainedConfig

DIRECT = ("llama", "qwen2", "qwen3")
_SHARD_BYTES = 2 << 30
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
# What GGUFReader raises, depending on where the bytes end or make no sense.
_DAMAGE = (ValueError, IndexError, KeyError, TypeError, OverflowError)
# Llama 3's frequency factors: they live in the config, not in the weights.
_NOT_WEIGHTS = ("rope_freqs.weight",)


def convert(path: Path, folder: Path, report: Callable[[str], None] = print) -> None:
    """Write the model in the GGUF file at `path` into the existing, empty `folder`.

    UserError: the file is cut off, is one part of several, or holds something that is not known
    here.
    """
    reader = open_gguf(path)
    meta = {key: field.contents() for key, field in reader.fields.items()}
    architecture = meta["general.architecture"]
    report(f"converting {path.name} ({architecture}, weights {_stored_as(reader)}) to bf16")
    need_space(folder, sum(2 * int(tensor.n_elements) for tensor in reader.tensors))
    if architecture in DIRECT:
        config = model_config(meta, reader, path)
        _write_weights(reader, config, folder, path)
        config.save_pretrained(folder)
    else:
        config = _convert_with_transformers(path, folder)
    (folder / "generation_config.json").write_text(json.dumps(generation_config(meta), indent=2))
    write_tokenizer(meta, path, folder, config.max_position_embeddings)


def _stored_as(reader: "GGUFReader") -> str:
    """Types of the tensors, the one with most weights first: precision lost for good."""
    sizes: Counter[str] = Counter()
    for tensor in reader.tensors:
        sizes[tensor.tensor_type.name] += int(tensor.n_elements)
    return ", ".join(name for name, _ in sizes.most_common())


def open_gguf(path: Path) -> "GGUFReader":
    """The opened file, with every tensor inside it; UserError: cut off, damaged or split."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except _DAMAGE as error:
        raise UserError(
            f"{path} is cut off, damaged or not a GGUF file ({error}); download it again"
        ) from error
    if "general.architecture" not in reader.fields:
        raise UserError(f"{path} names no architecture: it holds no language model")
    parts = reader.fields.get("split.count")
    if parts is not None and parts.contents() > 1:
        raise UserError(
            f"{path} is one of {parts.contents()} parts; join them first: "
            "llama-gguf-split --merge FIRST_PART WHOLE.gguf"
        )
    return reader


def _write_weights(
    reader: "GGUFReader", config: "PretrainedConfig", folder: Path, path: Path
) -> None:
    """Stream every tensor into shards of at most 2 GB, then the index if there are several."""
    from safetensors.torch import save_file

    tensors = _named_tensors(reader, path)
    _check_against_model(tensors, config, path)
    shards = list(_shards(tensors))
    where: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weights = {name: _bf16(tensors[name], name, config, path) for name in names}
        save_file(weights, folder / file, metadata={"format": "pt"})
        # safetensors makes its files readable by their owner only.
        (folder / file).chmod(0o644)
        where.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        size = sum(2 * int(tensor.n_elements) for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _named_tensors(reader: "GGUFReader", path: Path) -> dict[str, "ReaderTensor"]:
    """Tensors of the file by their names in transformers."""
    tensors = {}
    for tensor in reader.tensors:
        if tensor.name not in _NOT_WEIGHTS:
            tensors[_transformers_name(tensor.name, path)] = tensor
    return tensors


def _transformers_name(name: str, path: Path) -> str:
    if name in _TOP:
        return _TOP[name]
    block, _, rest = name.removeprefix("blk.").partition(".")
    layer, _, kind = rest.rpartition(".")
    if not name.startswith("blk.") or layer not in _BLOCK:
        raise UserError(
            f"{path}: tensor {name!r} has no place in a dense {'/'.join(DIRECT)} model; use the "
            "model's safetensors folder instead"
        )
    return f"model.layers.{block}.{_BLOCK[layer]}.{kind}"


def _check_against_model(
    tensors: dict[str, "ReaderTensor"], config: "PretrainedConfig", path: Path
) -> None:
    """UserError unless names and shapes are those of the transformers model of this config."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight")
    # GGUF lists dimensions from the fastest to the slowest.
    found = {name: tuple(map(int, tensor.shape[::-1])) for name, tensor in tensors.items()}
    wrong = sorted(
        name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
    )
    if wrong:
        name = wrong[0]
        raise UserError(
            f"{path}: {name} should have shape {expected.get(name)} and has {found.get(name)} "
            f"(None: absent); {len(wrong)} tensors differ from a {config.model_type} model"
        )


def _shards(tensors: dict[str, "ReaderTensor"]) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        size_bytes = 2 * int(tensor.n_elements)
        if names and size + size_bytes > _SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += size_bytes
    yield names


def _bf16(
    tensor: "ReaderTensor", name: str, config: "PretrainedConfig", path: Path
) -> "torch.Tensor":
    """The dequantized tensor in transformers' row order, bfloat16."""
    import torch
    from gguf.quants import dequantize

    try:
        weight = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise UserError(
            f"{path}: {tensor.name} is stored as {tensor.tensor_type.name}, which the gguf package "
            "cannot dequantize"
        ) from error
    if config.model_type == "llama" and ("q_proj" in name or "k_proj" in name):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        weight = _rotary_halves(weight, heads)
    # A copy: the data may be a read-only view of the file.
    return torch.from_numpy(np.array(weight)).to(torch.bfloat16)


def _rotary_halves(weight: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """Rows of each head from interleaved pairs (llama.cpp) to two halves (transformers)."""
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _convert_with_transformers(path: Path, folder: Path) -> "PretrainedConfig":
    """Load and save through transformers; the config of the model. Holds the whole model."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, dtype=torch.bfloat16
        )
    except (ValueError, NotImplementedError) as error:
        raise UserError(
            f"{path}: neither qtune nor transformers reads this GGUF architecture ({error}); use "
            "the model's safetensors folder instead"
        ) from error
    model.save_pretrained(folder)
    return model.config
