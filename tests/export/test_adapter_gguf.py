"""LoRA files on a 16-bit base in llama.cpp, compared with PEFT's adapter there."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader

from qtune.export.exporter import Trained, export, load_exporter
from qtune.export.verify import check_logits, reload
from qtune.recipe import Lora, Quant

pytest.importorskip("xllamacpp")
ADAPTERS = {
    "plain": Lora(rank=4, alpha=8),
    "rslora": Lora(rank=4, alpha=8, rslora=True),
    "patterns": Lora(
        rank=4, alpha=8, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 5, "up_proj": 1}
    ),
}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_llamacpp_applies_it_as_peft_does(
    kind: str, family: str, train: Callable[..., Trained], rows: list[list[int]], tmp_path: Path
) -> None:
    trained = train(family, quant=Quant(format=None), lora=ADAPTERS[kind])
    folder = export("adapter-gguf", trained, tmp_path / "adapter")
    found = reload("adapter-gguf", folder, trained.base_folder, torch.device("cpu"))
    check_logits(found, trained.model.float(), rows, max_change=0.005)


def test_its_beginning_is_left_out(
    train: Callable[..., Trained], rows: list[list[int]], tmp_path: Path
) -> None:
    """As in `adapter`: on the original weights only what training changed counts."""
    trained = train(quant=Quant(format=None))
    torch.manual_seed(3)
    layers = trained.model.get_base_model().named_modules()
    start = {
        name: (0.05 * torch.randn(4, layer.in_features), 0.05 * torch.randn(layer.out_features, 4))
        for name, layer in layers
        if name.endswith("q_proj")
    }
    peft = export("adapter", replace(trained, start=start), tmp_path / "peft")
    expected = reload("adapter", peft, trained.base_folder, torch.device("cpu"))
    folder = export("adapter-gguf", replace(trained, start=start), tmp_path / "adapter")
    found = reload("adapter-gguf", folder, trained.base_folder, torch.device("cpu"))
    check_logits(found, expected, rows, max_change=0.02)
    ranks = {t.name: int(t.shape[1]) for t in GGUFReader(folder / "adapter.gguf").tensors}
    assert ranks["blk.0.attn_q.weight.lora_a"] == 8


def test_more_than_lora_is_refused_before_training(train: Callable[..., Trained]) -> None:
    recipe = replace(train().recipe, lora=Lora(dora=True))
    (problem,) = load_exporter("adapter-gguf").check(recipe)
    assert "lora.dora" in problem and "merged gguf" in problem
