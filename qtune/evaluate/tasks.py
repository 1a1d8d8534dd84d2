"""Tasks of the lm-eval harness by their names: found, loaded, and ready to be asked.

A name is looked up among the user's own task files first. Only where it is not there are the
harness's own read, thousands of files that take it a while. Everything that can be wrong with a
task is found here, before any model is loaded.
"""

import difflib
import functools
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

from qtune.errors import UserError
from qtune.progress import say

# the harness's own, so that the examples in prompts are those of its published results
SEED = 1234
CODE = "HF_ALLOW_CODE_EVAL"


@dataclass(frozen=True)
class Tasks:
    """What lm-eval loaded, and of all that the names of the scores that were asked for."""

    loaded: dict[str, Any]
    names: tuple[str, ...]


@functools.cache
def load_tasks(names: tuple[str, ...], path: Path | None, shots: int | None) -> Tasks:
    """The tasks, with that many examples in their prompts; with None as many as each says.

    Raises UserError: lm-eval is missing, there is no such task, its data cannot be had, or it runs
    code that a model wrote and that was not allowed.
    """
    if find_spec("lm_eval") is None:
        raise UserError("evaluate.tasks needs the lm-eval harness: pip install 'qtune[eval]'")
    with quiet():
        manager = _manager(names, path)
        for name in names:
            _check_code(name, manager)
        parts = [_loaded(name, manager) for name in names]
    shown = [_shown(name, part) for name, part in zip(names, parts, strict=True)]
    kinds = ("tasks", "groups", "group_map")
    loaded = {kind: {k: v for part in parts for k, v in part[kind].items()} for kind in kinds}
    for task in loaded["tasks"].values():
        _set_shots(task, shots)
    return Tasks(loaded, tuple(dict.fromkeys(name for part in shown for name in part)))


@contextmanager
def quiet() -> Iterator[None]:
    """Meanwhile the harness and the data library keep their bars and advice to themselves."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _manager(names: Sequence[str], path: Path | None) -> Any:
    """lm-eval's index of tasks. UserError: a name is not in it."""
    from lm_eval.tasks import TaskManager

    folder = _folder(path)
    manager = TaskManager(include_path=folder, include_defaults=False)
    if set(names) <= set(manager.all_tasks):
        return manager
    say("evaluate.tasks: reading the tasks of lm-eval")
    manager = TaskManager(include_path=folder)
    for name in names:
        if name not in manager.task_index:
            raise UserError(f"evaluate.tasks: no task '{name}'{_hint(name, manager, path)}")
    return manager


def _folder(path: Path | None) -> str | None:
    """The folder that task files are in. UserError: there is none, or it has none."""
    if path is None:
        return None
    if not path.exists():
        raise UserError(f"evaluate.task_path: {path}: no such file or folder")
    folder = path if path.is_dir() else path.parent
    if not any(folder.rglob("*.yaml")):
        raise UserError(f"evaluate.task_path: {folder} holds no task, that is no .yaml file")
    return str(folder.absolute())


def _hint(name: str, manager: Any, path: Path | None) -> str:
    close = difflib.get_close_matches(name, manager.all_tasks, n=3)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    where = "set evaluate.task_path for one of your own" if path is None else f"none in {path}"
    return f" in lm-eval; {where}"


def _check_code(name: str, manager: Any) -> None:
    """Raises UserError for a task that runs what a model wrote, unless that was allowed."""
    code = (manager.task_index[name].cfg or {}).get("unsafe_code")
    if code and os.environ.get(CODE) != "1":
        raise UserError(
            f"evaluate.tasks: {name} runs programs that the model writes, on this machine and "
            f"without a sandbox; where that is safe, set {CODE}=1 in the environment"
        )


def _loaded(name: str, manager: Any) -> Any:
    """A task or group with its data. UserError: it cannot be loaded."""
    try:
        return manager.load([name])
    except ConnectionError as error:
        raise UserError(
            f"evaluate.tasks: {name} needs data from the Hugging Face hub ({error}); where there "
            "is a network run the same command once, or `hf download --repo-type dataset NAME` "
            "with its name, and copy the cache folder (HF_HOME) here"
        ) from error
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        raise UserError(f"evaluate.tasks: {name} cannot be loaded: {error}") from error


def _shown(name: str, part: Any) -> list[str]:
    """The names of the scores of a task or group: its own, or those of what it stands for."""
    group = part["groups"].get(name)
    if name in part["tasks"] or (group is not None and group.has_aggregation):
        return [name]
    return list(part["tasks"])


def _set_shots(task: Any, shots: int | None) -> None:
    """Set how many examples a prompt has; a task that says none has none, whatever is wished."""
    own = task.get_config("num_fewshot")
    if own is None or (shots is not None and own != 0):
        task.set_config(key="num_fewshot", value=shots or 0)
