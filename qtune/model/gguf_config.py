"""config.json and generation_config.json from the metadata of a GGUF file.

transformers would fill what is absent with defaults of its own, so sizes and the norm epsilon must
be in the file. What GGUF leaves out (key heads, head size, rope theta) has llama.cpp's default.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qtune.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PretrainedConfig

_FIELDS = {
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
# llama.cpp's own default where a file is silent.
_ROPE_THETA = 10000.0
_SPECIAL = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
_INSTEAD = "use the model's safetensors folder instead"
_STOPS = ("eos", "eot", "eom")


def model_config(meta: Mapping[str, Any], reader: "GGUFReader", path: Path) -> "PretrainedConfig":
    """transformers' config of a llama, qwen2 or qwen3 model; UserError: a value is missing."""
    from transformers import CONFIG_MAPPING

    architecture = meta["general.architecture"]
    shapes = {tensor.name: tensor.shape for tensor in reader.tensors}
    if "token_embd.weight" not in shapes:
        raise UserError(f"{path} holds no token_embd.weight: it is no whole language model")
    values = {name: _number(meta, f"{architecture}.{key}", path) for name, key in _FIELDS.items()}
    heads = values["num_attention_heads"]
    head_dim = meta.get(f"{architecture}.attention.key_length", values["hidden_size"] // heads)
    values["head_dim"] = head_dim
    if meta.get(f"{architecture}.rope.dimension_count", head_dim) != head_dim:
        raise UserError(f"{path}: a rope over part of each head is not known here; {_INSTEAD}")
    values["num_key_value_heads"] = meta.get(f"{architecture}.attention.head_count_kv", heads)
    values["vocab_size"] = int(shapes["token_embd.weight"][-1])
    values["tie_word_embeddings"] = "output.weight" not in shapes
    values["rope_parameters"] = _rope(meta, reader, path, head_dim)
    if architecture in ("llama", "qwen3"):
        values["attention_bias"] = "blk.0.attn_q.bias" in shapes
    for name, key in _SPECIAL.items():
        values[name] = meta.get(f"tokenizer.ggml.{key}_token_id")
    kind = CONFIG_MAPPING[architecture]
    model_class = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[architecture]
    return kind(architectures=[f"{model_class}ForCausalLM"], dtype="bfloat16", **values)


def generation_config(meta: Mapping[str, Any]) -> dict[str, Any]:
    """BOS, PAD and every id that ends an answer, as transformers' generation_config.json."""
    config: dict[str, Any] = {
        name: meta[f"tokenizer.ggml.{key}_token_id"]
        for name, key in _SPECIAL.items()
        if f"tokenizer.ggml.{key}_token_id" in meta
    }
    ids = [meta.get(f"tokenizer.ggml.{key}_token_id") for key in _STOPS]
    stops = sorted({number for number in ids if number is not None}, key=ids.index)
    if stops:
        config["eos_token_id"] = stops[0] if len(stops) == 1 else stops
    return config


def _number(meta: Mapping[str, Any], key: str, path: Path) -> Any:
    value = meta.get(key)
    if not isinstance(value, int | float):
        raise UserError(f"{path}: {key} is {value!r}, a number is needed; the file cannot be used")
    # float32 in the file: 9.999999747378752e-06 was written as 1e-05.
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _rope(
    meta: Mapping[str, Any], reader: "GGUFReader", path: Path, head_dim: int
) -> dict[str, Any]:
    """transformers' `rope_parameters`."""
    prefix = f"{meta['general.architecture']}.rope"
    theta = float(meta.get(f"{prefix}.freq_base", _ROPE_THETA))
    factors = next((t.data for t in reader.tensors if t.name == "rope_freqs.weight"), None)
    scaling = meta.get(f"{prefix}.scaling.type", "none")
    if factors is not None:
        return {"rope_theta": theta, **_llama3_scaling(factors, theta, head_dim, path)}
    if scaling == "none":
        return {"rope_theta": theta, "rope_type": "default"}
    factor = float(_number(meta, f"{prefix}.scaling.factor", path))
    if scaling == "linear":
        return {"rope_theta": theta, "rope_type": "linear", "factor": factor}
    raise UserError(f"{path}: rope scaling {scaling!r} is not known here; {_INSTEAD}")


def _llama3_scaling(
    factors: npt.NDArray[Any], theta: float, head_dim: int, path: Path
) -> dict[str, Any]:
    """The Llama 3.1 scaling whose frequency factors are the ones in the file."""
    factor = float(factors.max())
    low, high, original = 1.0, 4.0, 8192
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise UserError(
            f"{path}: its rope frequency factors are not those of Llama 3.1; {_INSTEAD}"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
