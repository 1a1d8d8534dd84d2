"""Everything a run needs before it trains, checked: model files, tokenizer, data. Nothing is written."""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from qtune.data.prepare import Dataset, prepare
from qtune.model.load import load_tokenizer, register
from qtune.model.sources import resolve
from qtune.progress import console
from qtune.recipe import Recipe

MOST_WARNINGS = 5


@dataclass(frozen=True)
class Setup:
    """A recipe with what it names opened: the base model's folder, its tokenizer, the samples."""

    recipe: Recipe
    base: Path
    tokenizer: PreTrainedTokenizerBase
    data: Dataset
    device: torch.device


def open_setup(recipe: Recipe, accelerator: Accelerator) -> Setup:
    """The opened recipe; raises UserError for whatever is missing or damaged."""
    register()
    with accelerator.main_process_first():
        base = resolve(recipe.model, revision=recipe.revision, report=console.print)
    tokenizer = load_tokenizer(base, trust_remote_code=recipe.trust_remote_code)
    data = prepare(recipe.data, tokenizer, recipe.seed)
    for finding in data.warnings[:MOST_WARNINGS]:
        console.print(f"[yellow]note[/] {finding}")
    if len(data.warnings) > MOST_WARNINGS:
        console.print(f"[yellow]note[/] and {len(data.warnings) - MOST_WARNINGS} more")
    return Setup(recipe, base, tokenizer, data, accelerator.device)
