"""What onnxruntime-genai has to know of a folder to serve it: genai_config.json."""

from typing import Any

from qtune.export.onnx_graph.decoder import PAST, PRESENT, Sizes
from qtune.export.onnx_graph.graph import MODEL

NAME = "genai_config.json"


def genai_config(config: Any, generation: dict[str, Any]) -> dict[str, Any]:
    """The settings of a decoder with this transformers config and generation settings."""
    sizes, length = Sizes.of(config), config.max_position_embeddings
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": MODEL,
        "head_size": sizes.head_size,
        "hidden_size": config.hidden_size,
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": sizes.kv_heads,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": f"{PAST}.%d.key",
            "past_value_names": f"{PAST}.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": f"{PRESENT}.%d.key",
            "present_value_names": f"{PRESENT}.%d.value",
        },
    }
    ids = {key: generation.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    known = {key: value for key, value in ids.items() if value is not None}
    model = {"type": config.model_type, "context_length": length, "vocab_size": config.vocab_size}
    return {
        "model": model | known | {"decoder": decoder},
        "search": {"do_sample": False, "max_length": length, "past_present_share_buffer": True},
    }
