"""The rules of vLLM for adapters."""

import json
from pathlib import Path
from typing import Any

import pytest

from qtune.export.folder.vllm_lora import notes, problems

PLAIN: dict[str, Any] = {
    "r": 16, "lora_alpha": 32, "target_modules": ["q_proj"], "bias": "none", "use_dora": False,
    "use_rslora": True, "init_lora_weights": True, "modules_to_save": None, "rank_pattern": {},
    "lora_bias": False, "use_qalora": False, "layer_replication": None,
    "alora_invocation_tokens": None,
}  # fmt: skip


def test_plain_adapters_are_loaded() -> None:
    assert problems(PLAIN) == []
    assert problems(PLAIN | {"modules_to_save": ["score"], "rank_pattern": {"a": 512}}) == []
    assert problems(PLAIN | {"init_lora_weights": "gaussian"}) == []
    assert problems({"r": 8, "lora_alpha": 8, "target_modules": ["q_proj"]}) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"r": 1024}, "rank 1024 is above 512"),
        ({"rank_pattern": {"down_proj": 640}}, "rank 640"),
        ({"bias": "lora_only"}, "biases"),
        ({"lora_bias": True}, "biases of its own"),
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head", "score"]}, "whole layers (lm_head)"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4, changed the base"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"use_bdlora": {"nblocks": 2}}, "BD-LoRA"),
        ({"trainable_token_indices": [7]}, "trained tokens"),
        ({"use_qalora": True}, "export the quantized model"),
        ({"layer_replication": [[0, 4], [2, 5]]}, "repeats layers"),
        ({"alora_invocation_tokens": [1]}, "aLoRA"),
    ],
)
def test_others_are_named(change: dict[str, Any], reason: str) -> None:
    (problem,) = problems(PLAIN | change)
    assert reason in problem


def test_notes_are_of_the_adapter_wherever_it_lies(tmp_path: Path) -> None:
    assert notes(tmp_path) == {}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(PLAIN))
    assert notes(tmp_path) == {"vllm": []}
    (tmp_path / "adapter_config.json").write_text(json.dumps(PLAIN | {"use_dora": True}))
    assert notes(tmp_path) == {"vllm": ["it has lengths of DoRA; merge it"]}
