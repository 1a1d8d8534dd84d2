"""What transformers is asked for, and what is told where gptqmodel is not installed."""

import json
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

from qtune.export.consumers import gptqmodel
from qtune.export.folder.load import NotInstalled

STORED = {
    "gptq": {"quant_method": "gptq", "bits": 8, "group_size": 64},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128},
}


@pytest.mark.parametrize(
    ("method", "kind", "backend"),
    [("gptq", GPTQConfig, "gptq_torch"), ("awq", AwqConfig, "torch_awq")],
)
def test_plain_kernels_on_a_cpu_and_the_best_elsewhere(
    method: str, kind: type, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(gptqmodel, "find_spec", lambda name: ModuleSpec(name, None))
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda folder, **options: asked.append(options)
    )
    config = {"quantization_config": STORED[method]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for device in ("cpu", "cuda"):
        gptqmodel.load(tmp_path, torch.device(device))
    on_cpu, on_gpu = (options["quantization_config"] for options in asked)
    assert isinstance(on_cpu, kind)
    assert (on_cpu.bits, on_cpu.group_size) == (
        STORED[method]["bits"],
        STORED[method]["group_size"],
    )
    assert (on_cpu.backend, on_gpu.backend) == (backend, "auto")


@pytest.mark.parametrize("missing", ["gptqmodel", "optimum"])
def test_what_is_missing_is_named(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = {"gptqmodel", "optimum"} - {missing}
    monkeypatch.setattr(
        gptqmodel, "find_spec", lambda name: ModuleSpec(name, None) if name in there else None
    )
    with pytest.raises(NotInstalled, match=rf"missing: {missing}; pip install gptqmodel optimum"):
        gptqmodel.load(tmp_path, torch.device("cpu"))
