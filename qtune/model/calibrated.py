"""The quantized form of a model whose codes were found with text, made once and kept.

Like the folders of `prequantized.py`, and loaded like them; beside the weights lie the start of the
adapter where it is not zero, and `calibration.json`: what text it was, and what part of its output
each layer loses. The text is a part of the key, so another text makes another folder.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from qtune.cache import build_once, wait_for
from qtune.data.calibration import Text
from qtune.errors import UserError
from qtune.model.cache import model_folder
from qtune.model.calibration.job import FIGURES, Job
from qtune.model.folder import is_quantized
from qtune.model.prequantized import identity_of
from qtune.model.start import FILE as START_FILE
from qtune.recipe import Recipe

# part of every folder's name: raised when codes or names become others
VERSION = 1


def is_calibrated(recipe: Recipe) -> bool:
    """Whether the recipe's base, or the start of its adapter, is found with text."""
    return recipe.quant.method != "nearest" or recipe.lora.init != "zero"


def calibrated_folder(
    folder: Path,
    recipe: Recipe,
    text: Callable[[], Text],
    *,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    builds: bool = True,
) -> Path:
    """A folder of the same model, quantized as the recipe says with the help of `text()`.

    With `builds` false, once another process has made it. An interrupted calibration goes on with
    the block that it was at. Raises UserError where the folder is quantized already, lacks weights
    or the cache has no room, and for a model without blocks that run one after the other.
    """
    if is_quantized(folder):
        raise UserError(
            f"{folder} is quantized already, so there are no weights to find better codes for; "
            "name the 16-bit model, or set quant.method: nearest and lora.init: zero"
        )
    found = text()
    place = calibrated_place(folder, recipe, found.sha256, dtype)
    if not builds:
        return wait_for(place)
    kept = place.with_name(f".{place.name}.blocks")
    job = Job(folder, recipe, found, kept, device, dtype)
    return build_once(place, job.run)


def calibrated_place(
    folder: Path, recipe: Recipe, sha256: str, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """Where the calibrated form of a model folder is, or would be, for the text of that hash."""
    quant, lora = recipe.quant, recipe.lora
    # the hash stands for the text
    calibration = replace(quant.calibration, text="", tokens=1)
    settings = replace(quant, calibration=calibration)
    layers = lora.target_modules, lora.modules_to_save, lora.rank, lora.rank_pattern
    start = "" if lora.init == "zero" else f"{lora.init} {layers}"
    identity = f"{VERSION} {identity_of(folder)} {settings} {start} {dtype} {sha256}"
    return model_folder(f"{folder.name}-{quant.format}-{quant.method}", identity)


def keep_beside(folder: Path, figures: Path, start: Path) -> None:
    """Copy what a calibrated folder tells of itself to these places; nothing for other folders."""
    for name, place in ((FIGURES, figures), (START_FILE, start)):
        if (folder / name).exists():
            shutil.copyfile(folder / name, place)
