"""What config.json says of a compressed-tensors folder, as vLLM and transformers read it."""

from typing import Any

from qtune.export.folder import kv_scales
from qtune.export.folder.int_base import group_entry
from qtune.export.folder.quantized import dense_linears
from qtune.export.folder.trained import Trained


def packed_config(trained: Trained, bits: int) -> dict[str, Any]:
    """For codes of so many bits, 16-bit inputs, and zero points where the format has them."""
    size = group_entry(trained)
    groups: dict[str, Any] = {"strategy": "channel", "group_size": None}
    if size > 0:
        groups = {"strategy": "group", "group_size": size}
    weights = _weights(bits, "int", symmetric=trained.recipe.quant.format != "int4") | groups
    config = _config(trained, "pack-quantized", weights, None)
    # the scheme's own loading keeps scales in the dtype of the model, and fails with zero points
    return config | {"dequantize": True}


def rows_config(trained: Trained, kind: str) -> dict[str, Any]:
    """For weights of 8 bits with a scale for each row, and inputs rounded token by token."""
    weights = _weights(8, kind, symmetric=True) | {"strategy": "channel", "group_size": None}
    inputs = {
        "num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True,
    }  # fmt: skip
    return _config(trained, f"{kind}-quantized", weights, inputs)


def _weights(bits: int, kind: str, *, symmetric: bool) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": kind,
        "symmetric": symmetric,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
    }


def _config(
    trained: Trained, layout: str, weights: dict[str, Any], inputs: dict[str, Any] | None
) -> dict[str, Any]:
    scheme = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "ignore": dense_linears(trained),
        "kv_cache_scheme": kv_scales.SCHEME if trained.recipe.merge.kv_scales else None,
        "config_groups": {"group_0": scheme},
    }
