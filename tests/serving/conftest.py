"""Small exports with golden prompts and results, as a run leaves them, and copies to spoil."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qtune.data import demo
from qtune.data.rows import Row
from qtune.export import verify
from qtune.export.exporter import Trained, export
from qtune.export.folder import golden, manifest
from qtune.model.load import add_adapter, load_base, load_tokenizer
from qtune.recipe import Data, Lora, Quant, Recipe, Train

CPU = torch.device("cpu")
RESULT: dict[str, Any] = {
    "name": "x",
    "kind": "export",
    "loss": 1.25,
    "perplexity": 3.49,
    "tokens": 100,
    "kl": 0.001,
    "top1": 0.98,
    "exact_match": 0.5,
    "answers": 10,
    "size_bytes": 123456,
}


@pytest.fixture(scope="session")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with weights so large, and a head of its own, that it is sure of itself."""
    folder = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("serving") / "base"))
    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.mul_(30 if "lm_head" in name else 6)
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\n---\n# The base\n")
    return folder


@pytest.fixture(scope="session")
def trained(base: Path) -> Trained:
    """The tiny model with an adapter in which nothing is zero."""
    recipe = Recipe(
        model=str(base), data=Data(train="demo:train"), train=Train(steps=1),
        run=Path("runs/first"),
        quant=Quant(), lora=Lora(rank=4, alpha=8),
    )  # fmt: skip
    model = add_adapter(load_base(base, recipe.quant, device=CPU), recipe.lora)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in (p for p in model.parameters() if p.requires_grad):
            weight.add_(0.05 * torch.randn_like(weight))
    return Trained(recipe, model.eval(), load_tokenizer(base), base)


@pytest.fixture(scope="session")
def exported(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A maker of exports by name; each folder is made once, and is not to be changed."""
    root, made = tmp_path_factory.mktemp("exports"), {}
    rows = [Row("demo", i, row["messages"]) for i, row in enumerate(demo.rows("test", 2))]

    def make(name: str, **changes: Any) -> Path:
        if name not in made:
            folder = export(name, replace(trained, **changes), root / name)
            model = verify.reload(name, folder, trained.base_folder, CPU)
            prompts = golden.prompts(trained.tokenizer, rows, [])
            verify.add_golden(folder, model, trained.tokenizer, prompts, max_new_tokens=6)
            manifest.add_results(folder, RESULT, RESULT | {"loss": 1.2}, None)
            made[name] = folder
        return made[name]

    return make


@pytest.fixture
def copied(exported: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A maker of copies of exports, which a test may spoil."""

    def make(name: str, **changes: Any) -> Path:
        return Path(shutil.copytree(exported(name, **changes), tmp_path / name))

    return make
