"""What a recipe asks of every model beside held-out data: tasks, a text, and prompts.

All of it is opened before the first model is loaded, so that a missing file or task is told then.
"""

from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from qtune.evaluate.generate import answer, moving
from qtune.evaluate.harness import run_tasks
from qtune.evaluate.prompts import Suite, read_prompts
from qtune.evaluate.task_score import Graded, against
from qtune.evaluate.tasks import load_tasks
from qtune.evaluate.text_perplexity import TextLikelihood, read_text, text_likelihood
from qtune.progress import bar
from qtune.recipe_evaluate import Evaluate


def check(settings: Evaluate) -> None:
    """Raises UserError for a task, text or prompts that a run could not measure with."""
    _open(settings)


class Suites:
    """The tasks, text and prompts of a recipe; the model measured with `keep` is the trained one.

    Raises UserError as `check` does.
    """

    def __init__(self, settings: Evaluate, tokenizer: PreTrainedTokenizerBase) -> None:
        self._settings, self._tokenizer = settings, tokenizer
        self._tasks, self._text, self.prompts = _open(settings)
        self._trained: list[Graded] = []

    def measure(self, name: str, model: nn.Module, *, keep: bool = False) -> dict[str, Any]:
        """What a row says of them: `tasks` and `text`. The answers to the prompts go to those."""
        facts: dict[str, Any] = {}
        if self._tasks is not None:
            found = run_tasks(model, self._tokenizer, self._tasks, self._settings, name)
            facts["tasks"] = against(found, [] if keep else self._trained)
            self._trained = found if keep else self._trained
        if self._text is not None:
            facts["text"] = self._likelihood(name, model, self._text)
        if self.prompts is not None:
            self.prompts.answers[name] = self._answers(name, model, self.prompts)
        return facts

    def _likelihood(self, name: str, model: nn.Module, text: str) -> TextLikelihood:
        settings = self._settings
        with bar(f"tokens of the text, {name}") as progress:
            return text_likelihood(
                model,
                self._tokenizer,
                text,
                file=settings.perplexity.name if settings.perplexity else "",
                context=settings.perplexity_context,
                stride=settings.perplexity_stride,
                on_progress=progress.advance,
            )

    def _answers(self, name: str, model: nn.Module, prompts: Suite) -> list[str]:
        with bar(f"prompts, {name}", len(prompts.rows)) as progress:
            return answer(
                model,
                self._tokenizer,
                prompts.rows,
                max_new_tokens=self._settings.max_new_tokens,
                batch_size=self._settings.batch_size,
                on_progress=moving(progress),
            ).texts


def _open(settings: Evaluate) -> tuple[Any, str | None, Suite | None]:
    """The tasks, the text and the prompts, each where the recipe names it."""
    tasks = None
    if settings.tasks:
        tasks = load_tasks(settings.tasks, settings.task_path, settings.task_shots)
    text = None if settings.perplexity is None else read_text(settings.perplexity)
    prompts = None if settings.prompts is None else Suite(read_prompts(settings.prompts))
    return tasks, text, prompts
