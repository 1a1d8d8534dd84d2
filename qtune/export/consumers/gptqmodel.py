"""Folders of integers as transformers loads them with gptqmodel, their only reader there."""

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig, PreTrainedModel

from qtune.export.folder.load import NotInstalled, with_adapter
from qtune.model.folder import read_json

NEEDED = ("gptqmodel", "optimum")
# what takes no compiling of C++; `auto` compiles for a quarter of an hour on a CPU
PLAIN = {"gptq": "gptq_torch", "awq": "torch_awq"}


def load(folder: Path, device: torch.device) -> PreTrainedModel | PeftModel:
    """The model on gptqmodel's layers, with its adapter if the folder has one.

    Raises NotInstalled where gptqmodel or optimum is not installed.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise NotInstalled(
            f"{folder.name} is loaded with gptqmodel and optimum; missing: {', '.join(missing)}; "
            "pip install gptqmodel optimum, or measure it where it is served"
        )
    stored = read_json(folder / "config.json")["quantization_config"]
    kind: Any = AwqConfig if stored["quant_method"] == "awq" else GPTQConfig
    backend = PLAIN[stored["quant_method"]] if device.type == "cpu" else "auto"
    config = kind(bits=stored["bits"], group_size=stored["group_size"], backend=backend)
    with warnings.catch_warnings():
        # it takes nothing but the backend from here, as it should
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        base = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", device_map={"": device}, quantization_config=config
        )
    return with_adapter(base, folder)
