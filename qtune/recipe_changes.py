"""What differs between a run's recipe and the one it is to be resumed with.

Keys that change nothing of the training may always change: where figures go, how often checkpoints
are written, what is measured, merged and exported afterwards. Every other key has to be allowed by
name, since a run that goes on with it is not the run that an uninterrupted one would have been.
"""

from collections.abc import Sequence
from dataclasses import asdict
from difflib import get_close_matches
from typing import Any

from qtune.errors import UserError
from qtune.recipe import Recipe
from qtune.yaml_document import flat

FREE = (
    *("run", "log", "export", "merge", "evaluate", "data.test"),
    *("train.save_every", "train.keep", "train.sample_every", "train.eval_every"),
)
# they decide which adapter is kept and when the run stops, where it goes by held-out losses
WATCHED = ("evaluate.loss_rows", "train.eval_every")


def changes(before: Recipe, now: Recipe) -> dict[str, str]:
    """The differing keys of two recipes that change the training, each as `old -> new`."""
    old, new = (_without_empty(flat(asdict(recipe))) for recipe in (before, now))
    return {
        key: f"{old.get(key)} -> {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not _is_free(key, now)
    }


def check_names(names: Sequence[str], recipe: Recipe) -> None:
    """Raises UserError for a name that is neither a key of the recipe nor a section."""
    keys = flat(asdict(recipe))
    known = {key.rsplit(".", i)[0] for key in keys for i in range(key.count(".") + 1)}
    for name in names:
        if name not in known:
            close = get_close_matches(name, known, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"--allow {name}: no such key in a recipe{hint}")


def covers(names: Sequence[str], key: str) -> bool:
    """Whether one of the names is the key, or a section that it belongs to."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _is_free(key: str, recipe: Recipe) -> bool:
    watches = recipe.train.keep_best or recipe.train.patience is not None
    return covers(FREE, key) and not (watches and key in WATCHED)


def _without_empty(flat: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in flat.items() if value != {}}
