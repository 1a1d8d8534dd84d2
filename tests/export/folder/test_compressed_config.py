"""The configuration, read by the library whose words it has."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from qtune.export.exporter import Trained
from qtune.export.folder.compressed_config import packed_config, rows_config
from qtune.recipe import Merge, Quant


def parsed(config: dict[str, Any]) -> Any:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    config = {key: value for key, value in config.items() if key != "dequantize"}
    return quantization.QuantizationConfig.model_validate(config)


@pytest.mark.parametrize(
    ("quant", "bits", "strategy", "group_size", "symmetric"),
    [
        (Quant(format="int4_sym"), 4, "group", 64, True),
        (Quant(format="int4", group_size=32), 4, "group", 32, False),
        (Quant(format="int8", group_size="row"), 8, "channel", None, True),
    ],
)
def test_codes(
    quant: Quant, bits: int, strategy: str, group_size: int | None, symmetric: bool,
    train: Callable[..., Trained],
) -> None:  # fmt: skip
    config = packed_config(train(quant=quant), bits)
    assert config["dequantize"] is True and config["kv_cache_scheme"] is None
    found = parsed(config)
    weights = found.config_groups["group_0"].weights
    assert (weights.num_bits, weights.type, weights.dynamic) == (bits, "int", False)
    assert (weights.strategy, weights.group_size) == (strategy, group_size)
    assert weights.symmetric == symmetric and weights.actorder is None
    assert found.config_groups["group_0"].input_activations is None
    assert (found.format, found.ignore) == ("pack-quantized", ["lm_head"])


@pytest.mark.parametrize("kind", ["int", "float"])
def test_rows(kind: str, train: Callable[..., Trained]) -> None:
    trained = train(quant=Quant(skip=("lm_head", "k_proj")))
    trained = replace(trained, recipe=replace(trained.recipe, merge=Merge(kv_scales=True)))
    config = rows_config(trained, kind)
    assert "dequantize" not in config, "the scheme's own loading rounds inputs as servers do"
    found = parsed(config)
    weights, inputs = (
        getattr(found.config_groups["group_0"], name) for name in ("weights", "input_activations")
    )
    assert (weights.num_bits, weights.type, weights.strategy) == (8, kind, "channel")
    assert (inputs.num_bits, inputs.type, inputs.strategy) == (8, kind, "token")
    assert inputs.dynamic and inputs.symmetric and weights.symmetric
    assert found.format == f"{kind}-quantized"
    assert found.ignore == ["lm_head", *(f"model.layers.{i}.self_attn.k_proj" for i in range(2))]
    cache = found.kv_cache_scheme
    assert (cache.num_bits, cache.type, cache.strategy, cache.dynamic) == (
        8, "float", "tensor", False,
    )  # fmt: skip
