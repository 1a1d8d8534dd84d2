"""Scales of keys and values against what the attention is really given."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from qtune.data.calibration import Text
from qtune.errors import UserError
from qtune.export.exporter import Trained
from qtune.export.folder.kv_scales import kv_scales
from qtune.recipe import Merge


def asking(trained: Trained, rows: list[list[int]] | None) -> Trained:
    recipe = replace(trained.recipe, merge=Merge(kv_scales=True))
    text = None if rows is None else lambda: Text(rows, "rows")
    return replace(trained, recipe=recipe, text=text)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_scales_reach_the_largest_of_all_rows(
    family: str, train: Callable[..., Trained], rows: list[list[int]]
) -> None:
    trained = asking(train(family), rows)
    found = dict(kv_scales(trained))
    caches: list[Any] = []
    for row in rows:
        ids = torch.tensor([row])
        with torch.no_grad():
            output = trained.model(input_ids=ids, past_key_values=DynamicCache(), use_cache=True)
        caches.append(output.past_key_values)
    for number in range(2):
        prefix = f"model.layers.{number}.self_attn"
        keys = max(cache.layers[number].keys.abs().max() for cache in caches)
        values = max(cache.layers[number].values.abs().max() for cache in caches)
        for word, largest in (("k", keys), ("v", values)):
            scale = found.pop(f"{prefix}.{word}_scale")
            assert scale.shape == (1,) and scale.dtype == torch.float32
            torch.testing.assert_close(scale, torch.tensor([largest.item() / 448]))
    assert not found


def test_the_adapter_is_on(train: Callable[..., Trained], rows: list[list[int]]) -> None:
    trained = asking(train(), rows)
    found = dict(kv_scales(trained))
    with trained.model.disable_adapter():
        assert dict(kv_scales(trained)) != found


def test_nothing_unless_asked_for(train: Callable[..., Trained]) -> None:
    assert list(kv_scales(train())) == []


def test_without_text_it_is_told(train: Callable[..., Trained]) -> None:
    with pytest.raises(UserError, match="there is none here"):
        list(kv_scales(asking(train(), None)))


def test_model_without_such_a_cache_is_told(
    train: Callable[..., Trained], rows: list[list[int]]
) -> None:
    trained = asking(train(), rows)
    for layer in trained.base.model.layers:
        layer.self_attn.layer_idx = None
    with pytest.raises(UserError, match="keeps keys and values in another way; leave it out"):
        list(kv_scales(trained))
