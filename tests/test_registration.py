"""Registration in fresh processes, whatever is imported first."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from qtune import registration
from qtune.model.load import load_base
from qtune.recipe import Quant

LOAD = """
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(FOLDER)
assert type(model.model.layers[0].mlp.up_proj).__name__ == "QuantLinear"
from peft import LoraConfig, get_peft_model
model = get_peft_model(model, LoraConfig(target_modules=["up_proj"]))
layer = model.base_model.model.model.layers[0].mlp.up_proj
assert type(layer).__name__ == "QuantLoraLinear", type(layer)
"""
ORDERS = {
    "qtune first": "import qtune, sys\nassert not {'torch', 'transformers'} & set(sys.modules)",
    "transformers first": "from transformers import PreTrainedModel; import qtune",
    "peft first": "import peft; import qtune",
    "our quantizer first": "from qtune.model.quantizer import QtuneConfig",
    "our adapter layer first": "from qtune.model.lora import QuantLoraLinear",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that transformers saved from a quantized model."""
    root = tmp_path_factory.mktemp("models")
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=16,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(root / "dense")
    base = load_base(root / "dense", Quant(), device=torch.device("cpu"))
    base.save_pretrained(root / "quantized")
    return root / "quantized"


@pytest.mark.parametrize("order", ORDERS)
def test_quantized_folder_loads_whatever_comes_first(order: str, folder: Path) -> None:
    code = f"FOLDER = {str(folder)!r}\n{ORDERS[order]}\n{LOAD}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_installing_again_adds_nothing() -> None:
    before = list(sys.meta_path)
    registration.install()
    assert sys.meta_path == before


def test_asking_whether_a_module_is_there_does_no_harm() -> None:
    spec = find_spec("peft")
    assert spec is not None and spec.origin is not None and Path(spec.origin).is_file()


def test_modules_look_as_if_nobody_had_watched() -> None:
    import peft
    import transformers.modeling_utils

    for module in (peft, transformers.modeling_utils):
        assert type(module.__loader__).__name__ == "SourceFileLoader"
        assert module.__spec__ is not None and module.__spec__.loader is module.__loader__
