"""How positions are turned into angles, in llama.cpp's words.

llama.cpp takes a base and a kind of scaling from the metadata. The scalings of Llama 3 and of Phi
with long contexts are factors per frequency, which are tensors of the file.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qtune.errors import UserError
from qtune.export.gguf_file.families import head_size, rope_dimensions

if TYPE_CHECKING:
    from gguf import GGUFWriter

# what llama.cpp takes in the windows of Gemma 3
_WINDOW_THETA = 10000.0


def add_rope(writer: "GGUFWriter", config: Any) -> None:
    """Write base, dimensions and scaling; UserError for a scaling that llama.cpp has not."""
    from gguf import RopeScalingType

    rope = _parameters(config)
    writer.add_rope_dimension_count(rope_dimensions(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        _add_yarn(writer, rope)
    elif kind == "longrope":
        writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
        writer.add_rope_scaling_attn_factors(_attention_factor(rope, config))
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    elif kind not in ("default", "linear", "llama3"):
        raise UserError(f"llama.cpp has no rope scaling of the type {kind}; export bf16")


def rope_tensors(config: Any) -> Iterator[tuple[str, Tensor]]:
    """Name and float32 values of factors by which frequencies are divided."""
    rope = _parameters(config)
    if rope.get("rope_type") == "llama3":
        yield "rope_freqs.weight", _llama3_factors(rope, head_size(config))
    elif rope.get("rope_type") == "longrope":
        for length in ("long", "short"):
            yield f"rope_factors_{length}.weight", torch.tensor(rope[f"{length}_factor"])


def _parameters(config: Any) -> dict[str, Any]:
    """The rope of the layers without a window."""
    rope: dict[str, Any] = config.rope_parameters
    if "full_attention" not in rope:
        return rope
    window = rope["sliding_attention"]
    if window["rope_theta"] != _WINDOW_THETA or window.get("rope_type", "default") != "default":
        raise UserError(
            f"llama.cpp has rope_theta {_WINDOW_THETA:g} without scaling in the windows of "
            f"{config.model_type}, and this model has {window}; export bf16"
        )
    full: dict[str, Any] = rope["full_attention"]
    return full


def _add_yarn(writer: "GGUFWriter", rope: dict[str, Any]) -> None:
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    for name, add in (
        ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
        ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
    ):
        if rope.get(name) is not None:
            add(rope[name])


def _attention_factor(rope: dict[str, Any], config: Any) -> float:
    """What attention is scaled by so that its spread stays as it was (arXiv 2402.13753)."""
    given = rope.get("attention_factor")
    if given is not None:
        return float(given)
    original = rope["original_max_position_embeddings"]
    factor = config.max_position_embeddings / original
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def _llama3_factors(rope: dict[str, Any], size: int) -> Tensor:
    """1 for short waves, `factor` for long ones, and a smooth way between them [size / 2]."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    exponents = torch.arange(0, size, 2, dtype=torch.float64) / size
    waves = 2 * math.pi * rope["rope_theta"] ** exponents
    turns = rope["original_max_position_embeddings"] / waves
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    factors: Tensor = 1 / ((1 - smooth) / rope["factor"] + smooth)
    return factors.float()
