"""Folders for gptqmodel: written by what a subclass packs and says, read by gptqmodel alone."""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qtune.export.folder.gptqmodel_folder import GptqmodelFolder
from qtune.export.folder.load import NotInstalled
from qtune.export.folder.trained import Trained
from qtune.model.folder import read_json
from qtune.quant.linear import QuantLinear


class Sizes(GptqmodelFolder):
    """Of each layer its sizes alone."""

    def layer_tensors(self, prefix: str, layer: QuantLinear) -> Iterator[tuple[str, Tensor]]:
        yield f"{prefix}sizes", torch.tensor(layer.shape)

    def quant_config(self, trained: Trained) -> dict[str, Any]:
        return {"quant_method": "sizes"}


def test_layers_are_those_of_the_subclass_and_the_adapter_lies_beside_them(
    train: Callable[..., Trained], tmp_path: Path
) -> None:
    trained = train()
    facts = Sizes().write(trained, tmp_path)
    assert facts == {"form": "pair", "vllm": []}
    tensors = load_file(tmp_path / "model.safetensors")
    projection = trained.base.get_submodule("model.layers.0.mlp.down_proj").base_layer
    assert tensors["model.layers.0.mlp.down_proj.sizes"].tolist() == list(projection.shape)
    assert "model.layers.0.mlp.down_proj.weight" not in tensors
    assert torch.equal(tensors["model.norm.weight"], trained.base.state_dict()["model.norm.weight"])
    assert read_json(tmp_path / "config.json")["quantization_config"] == {"quant_method": "sizes"}
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()


@pytest.mark.skipif(find_spec("gptqmodel") is not None, reason="gptqmodel is installed")
def test_without_gptqmodel_nobody_can_tell(tmp_path: Path) -> None:
    with pytest.raises(NotInstalled, match="pip install gptqmodel optimum"):
        Sizes().load(tmp_path, tmp_path, torch.device("cpu"))
