"""The run folder: what each stage leaves there, and how it is opened and created."""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qtune import recipe_yaml
from qtune.errors import UserError
from qtune.files import write_text
from qtune.recipe import Recipe

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


def check(recipe: Recipe, *, resume: bool) -> None:
    """Raises UserError unless the run folder is free or, to resume, holds a run of this recipe."""
    if resume:
        _check_same(recipe)
    else:
        _check_free(recipe.run)


def create(recipe: Recipe) -> RunFolder:
    """The recipe's run folder, made where it is not there, with the resolved recipe in it."""
    path = recipe.run
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_text(path / "recipe.yaml", recipe_yaml.dump(recipe))
    except OSError as error:
        raise UserError(f"run folder {path} cannot be written: {error.strerror}") from error
    return RunFolder(path, recipe)


def open_run(path: Path) -> RunFolder:
    """A run folder as an earlier command left it; raises UserError where it is none."""
    if not (path / "recipe.yaml").is_file():
        raise UserError(f"{path} is no run folder: it holds no recipe.yaml; give `run` of a recipe")
    return RunFolder(path, recipe_yaml.load(path / "recipe.yaml"))


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


def _check_same(recipe: Recipe) -> None:
    """Raises UserError where there is no run, or one of another recipe, naming what differs."""
    if not (recipe.run / "recipe.yaml").is_file():
        raise UserError(f"nothing to resume: {recipe.run} holds no run; start it without --resume")
    run = open_run(recipe.run)
    now, before = (_flat(asdict(r)) for r in (recipe, run.recipe))
    differing = [
        f"{key}: {before.get(key)} -> {now.get(key)}"
        for key in sorted(now.keys() | before.keys())
        if now.get(key) != before.get(key)
    ]
    if differing:
        raise UserError(
            f"cannot resume {recipe.run}: the recipe has changed ({'; '.join(differing)}); "
            "put it back, or start a new run with run=NAME"
        )


def _free_name(path: Path) -> Path:
    return next(p for i in range(2, 1000) if not (p := path.with_name(f"{path.name}-{i}")).exists())


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
