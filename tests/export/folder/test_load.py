"""Loading folders as any user would."""

from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel

from qtune.export.adapter import write_adapter
from qtune.export.exporter import Trained
from qtune.export.folder.load import load_adapter, load_model, with_adapter
from qtune.recipe import Lora

CPU = torch.device("cpu")


def test_model_comes_in_the_dtype_of_its_config(
    write_base: Callable[..., Path], tmp_path: Path
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(write_base(tmp_path / str(dtype), "llama", dtype), CPU)
        assert model.dtype == dtype and not model.training


def test_adapter_is_ready_for_evaluation(train: Callable[..., Trained], tmp_path: Path) -> None:
    trained = train(lora=Lora(rank=4, dropout=0.5))
    write_adapter(trained.model, tmp_path, "base", None)
    model = load_adapter(load_model(trained.base_folder, CPU), tmp_path)
    assert not any(module.training for module in model.modules())


def test_pair_has_its_adapter_on(train: Callable[..., Trained], tmp_path: Path) -> None:
    trained = train()
    base = load_model(trained.base_folder, CPU)
    assert with_adapter(base, tmp_path) is base
    (tmp_path / "adapter").mkdir()
    write_adapter(trained.model, tmp_path / "adapter", "base", None)
    assert isinstance(with_adapter(base, tmp_path), PeftModel)
