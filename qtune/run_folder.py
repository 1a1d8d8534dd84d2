"""The run folder: what each stage leaves there, and how it is opened and created."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtune import recipe_yaml
from qtune.errors import UserError
from qtune.files import write_text
from qtune.recipe import Recipe
from qtune.recipe_changes import changes, check_names, covers

# what the base was calibrated with, and what its layers lose
CALIBRATION = "calibration.json"
# sections of the recipe that training does not look at
LATER = ("evaluate", "merge")
# bytes that must be free beyond what the run is known to write
DISK_RESERVE = 1 << 28


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run and its recipe."""

    path: Path
    recipe: Recipe

    @property
    def adapter(self) -> Path:
        """The trained adapter, a plain PEFT folder."""
        return self.path / "adapter"

    @property
    def start(self) -> Path:
        """What the adapter began with, where that is not zero."""
        return self.path / "start.safetensors"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def exports(self) -> Path:
        """One folder per export."""
        return self.path / "export"

    @property
    def report(self) -> Path:
        """The page that shows it all."""
        return self.path / "report.html"

    def check_trained(self) -> None:
        """Raises UserError where the run has not trained its adapter yet."""
        if not self.adapter.is_dir():
            raise UserError(
                f"{self.path} holds no adapter: its training has not ended; go on with "
                f"`qtune train {self.path / 'recipe.yaml'} --resume`"
            )

    def write(self, name: str, value: Any) -> None:
        """Write a JSON file of the run; it is there whole or not at all."""
        write_json(self.path / name, value)

    def read(self, name: str) -> Any:
        """A JSON file of the run; None where the stage that writes it has not run."""
        path = self.path / name
        return json.loads(path.read_text()) if path.exists() else None


def check(recipe: Recipe, *, resume: bool, allow: Sequence[str] = ()) -> list[str]:
    """Keys that a resumed run changes, all of them allowed; none for a new run.

    Raises UserError unless the run folder is free or, to resume, holds a run of this recipe. A key
    that changes the training has to be in `allow`, itself or its section.
    """
    check_names(allow, recipe)
    if resume:
        return _check_same(recipe, allow)
    if allow:
        raise UserError("--allow is for --resume: a new run has no recipe that could have changed")
    _check_free(recipe.run)
    return []


def create(recipe: Recipe) -> RunFolder:
    """The recipe's run folder, made where it is not there, with the resolved recipe in it."""
    path = recipe.run
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_text(path / "recipe.yaml", recipe_yaml.dump(recipe))
    except OSError as error:
        raise UserError(f"run folder {path} cannot be written: {error.strerror}") from error
    return RunFolder(path, recipe)


def open_run(path: Path, overrides: Sequence[str] = ()) -> RunFolder:
    """A run folder as an earlier command left it, measured otherwise if `overrides` say so.

    Raises UserError where it is none, and for overrides of what it was trained with.
    """
    for text in overrides:
        if text.partition(".")[0] not in LATER:
            raise UserError(
                f"override '{text}': of a run that is trained only {' and '.join(LATER)} may be "
                "changed; for the rest, train another"
            )
    if not (path / "recipe.yaml").is_file():
        raise UserError(f"{path} is no run folder: it holds no recipe.yaml; give `run` of a recipe")
    return RunFolder(path, recipe_yaml.load(path / "recipe.yaml", overrides))


def check_disk(path: Path, needed: int) -> None:
    """Raises UserError where fewer than `needed` bytes and a reserve are free at `path`."""
    place = next(p for p in (path, *path.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < needed + DISK_RESERVE:
        raise UserError(
            f"disk too small at {place}: the run writes about {needed / 2**30:.1f} GiB, "
            f"{free / 2**30:.1f} GiB are free; free some, drop exports, or set run to another disk"
        )


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file under a temporary name and rename it."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def _check_free(path: Path) -> None:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(
            f"run folder {path} exists: continue that run with --resume, or choose another name, "
            f"for example run={_free_name(path)}"
        )
    place = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        raise UserError(f"run folder {path} cannot be written: no permission in {place}")


def _check_same(recipe: Recipe, allow: Sequence[str]) -> list[str]:
    """Raises UserError where there is no run, or one of another recipe, naming what differs."""
    if not (recipe.run / "recipe.yaml").is_file():
        raise UserError(f"nothing to resume: {recipe.run} holds no run; start it without --resume")
    found = changes(open_run(recipe.run).recipe, recipe)
    refused = [key for key in found if not covers(allow, key)]
    if refused:
        differing = "; ".join(f"{key}: {found[key]}" for key in refused)
        raise UserError(
            f"cannot resume {recipe.run}: the recipe has changed ({differing}); put it back, "
            f"allow it by --allow {' '.join(refused)}, or start a new run with run=NAME"
        )
    return list(found)


def _free_name(path: Path) -> Path:
    return next(p for i in range(2, 1000) if not (p := path.with_name(f"{path.name}-{i}")).exists())
