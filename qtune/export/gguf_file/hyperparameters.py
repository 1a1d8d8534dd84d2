"""The sizes and constants of a model in a GGUF file's metadata.

What llama.cpp has no word for, and takes from its own table of models, is compared with that and
refused where it differs: it would load, and give something else.
"""

from typing import TYPE_CHECKING, Any

from qtune.errors import UserError
from qtune.export.gguf_file.families import family_of, head_size
from qtune.export.gguf_file.rope import add_rope

if TYPE_CHECKING:
    from gguf import GGUFWriter

# blocks with a window for each without: llama.cpp's own tables
_WINDOWED = {"gemma2": 1, "gemma3_text": 5}
# the one model of either family with another scale of attention, by its number of blocks
_OTHER_SCALE = {"gemma2": 46, "gemma3_text": 62}


def add_hyperparameters(writer: "GGUFWriter", config: Any) -> None:
    """Write what llama.cpp needs to build the model; UserError: it has no such model."""
    check_config(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(_context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    add_rope(writer, config)
    if config.model_type == "phi3":
        # 0 tells llama.cpp that there is none
        writer.add_sliding_window(config.sliding_window or 0)
    elif config.model_type in _WINDOWED:
        writer.add_sliding_window(config.sliding_window)
        _add_caps(writer, config)


def _add_caps(writer: "GGUFWriter", config: Any) -> None:
    """What logits are softly limited to."""
    if config.attn_logit_softcapping:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _context_length(config: Any) -> int:
    """How long a text may be. The windows of Mistral and Qwen are not in llama.cpp, so a text is to
    end where they would begin.
    """
    longest: int = config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    if config.model_type in ("mistral", "qwen2", "qwen3") and window is not None:
        return min(longest, int(window))
    return longest


def check_config(config: Any) -> None:
    """Raises UserError for the first thing that llama.cpp would compute in another way."""
    family_of(config.model_type)
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    gemma = config.model_type in _WINDOWED
    problems = [
        (activation != ("gelu_pytorch_tanh" if gemma else "silu"), f"the activation {activation}"),
        (gemma and _attention_differs(config), f"query_pre_attn_scalar {_scale(config)}"),
        (gemma and _layers_differ(config), f"the layer types {getattr(config, 'layer_types', '')}"),
        (config.model_type == "qwen3" and config.attention_bias, "biases of attention"),
    ]
    for differs, what in problems:
        if differs:
            raise UserError(f"llama.cpp has no {config.model_type} with {what}; export bf16")


def _scale(config: Any) -> float:
    return float(getattr(config, "query_pre_attn_scalar", 0))


def _attention_differs(config: Any) -> bool:
    expected = head_size(config)
    if config.num_hidden_layers == _OTHER_SCALE[config.model_type]:
        expected = config.hidden_size // config.num_attention_heads
    return _scale(config) != expected


def _layers_differ(config: Any) -> bool:
    """Whether windows are elsewhere than in all but every so-manieth block."""
    every = _WINDOWED[config.model_type] + 1
    return any(
        (kind == "full_attention") != ((block + 1) % every == 0)
        for block, kind in enumerate(config.layer_types)
    )
