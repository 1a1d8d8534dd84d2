"""The adapter beside its base."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from qtune.export.exporter import Trained
from qtune.export.folder.pair import write_beside


def test_adapter_lies_in_a_folder_of_its_own(train: Callable[..., Trained], tmp_path: Path) -> None:
    trained = train()
    write_beside(trained, tmp_path)
    found = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    own = trained.model.state_dict()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A"
    assert torch.equal(found[f"{name}.weight"], own[f"{name}.default.weight"])


def test_without_an_adapter_nothing_is_written(
    train: Callable[..., Trained], tmp_path: Path
) -> None:
    trained = train()
    for name in [name for name, _ in trained.model.named_modules() if name.endswith("lora_A")]:
        trained.model.get_submodule(name.rpartition(".")[0]).delete_adapter("default")
    write_beside(trained, tmp_path)
    assert list(tmp_path.iterdir()) == []
