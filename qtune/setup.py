"""Everything a run needs before it trains, checked: model files, tokenizer, data."""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from qtune.data.calibration import Text, calibration_text
from qtune.data.prepare import Dataset, prepare
from qtune.data.template import use_template
from qtune.errors import UserError
from qtune.evaluate.exact_match import matches
from qtune.model.calibrated import calibrated_folder, calibrated_place, is_calibrated
from qtune.model.load import load_tokenizer, register
from qtune.model.sources import resolve
from qtune.progress import say
from qtune.recipe import Recipe
from qtune.run_folder import CALIBRATION, RunFolder


@dataclass(frozen=True)
class Setup:
    """A recipe with what it names opened: the base model's folder, its tokenizer, the samples.

    `text` is what the base is calibrated with, where it is.
    """

    recipe: Recipe
    base: Path
    tokenizer: PreTrainedTokenizerBase
    data: Dataset
    device: torch.device
    text: Text | None = None


def open_setup(recipe: Recipe, accelerator: Accelerator, *, weights: bool = True) -> Setup:
    """The opened recipe; raises UserError for whatever is missing or damaged.

    Without `weights` the base model's folder may lack them.
    """
    _check_processes(recipe, accelerator)
    register()
    with accelerator.main_process_first():
        base = resolve(recipe.model, revision=recipe.revision, report=say, weights=weights)
    tokenizer = load_tokenizer(base, trust_remote_code=recipe.trust_remote_code)
    use_template(tokenizer, recipe.data.template)
    # one process of each machine tokenises; the others wait for its file, not in a collective
    # operation: those give up after minutes
    data = prepare(recipe, tokenizer, builds=accelerator.is_local_main_process)
    _check_references(recipe, data)
    return Setup(recipe, base, tokenizer, data, accelerator.device, _text(recipe, data, tokenizer))


def stored_base(setup: Setup, run: RunFolder, *, builds: bool = True) -> Path:
    """The folder that the run's frozen base is loaded from: the model's own, or a calibrated one.

    That is made where it is not in the cache, by this process or, with `builds` false, another.
    Raises UserError as `calibrated_folder` does, and where the run began with another text.
    """
    text = setup.text
    if text is None:
        return setup.base
    begun_with = (run.read(CALIBRATION) or {}).get("sha256", text.sha256)
    known = calibrated_place(setup.base, setup.recipe, begun_with)
    if known.is_dir():
        return known
    if begun_with != text.sha256:
        raise UserError(
            f"{run.path} was trained on a base that is not in the cache any more, and the text it "
            f"was calibrated with (quant.calibration.text: {text.source}) has changed since; put "
            "the data back"
        )
    recipe, device = setup.recipe, setup.device
    return calibrated_folder(setup.base, recipe, lambda: text, device=device, builds=builds)


def _text(recipe: Recipe, data: Dataset, tokenizer: PreTrainedTokenizerBase) -> Text | None:
    if not is_calibrated(recipe):
        return None
    return calibration_text(recipe.quant.calibration, data.feed.samples, tokenizer)


def _check_processes(recipe: Recipe, accelerator: Accelerator) -> None:
    if recipe.train.batch_size < accelerator.num_processes:
        raise UserError(
            f"train.batch_size ({recipe.train.batch_size}) leaves some of the "
            f"{accelerator.num_processes} processes without a sample; raise it, or start fewer"
        )


def _check_references(recipe: Recipe, data: Dataset) -> None:
    """Raises UserError for an expected answer that no answer could match."""
    metric = recipe.evaluate.metric
    for row in data.test[: recipe.evaluate.answer_rows]:
        expected = row.messages[-1]["content"]
        if not matches(expected, expected, metric):
            kind = {"number_match": "number", "contains": "text"}.get(metric, "JSON")
            raise UserError(
                f"{row.place}: the expected answer holds no {kind}, which evaluate.metric: "
                f"{metric} compares; mend the row, or set evaluate.metric: exact_match"
            )
