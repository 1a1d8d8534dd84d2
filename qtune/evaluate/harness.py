"""Any task of the lm-eval harness on any of our models, as it is in memory.

The harness asks through its own class for transformers models, so prompts, truncation and scoring
are those of its published results. What that class is handed is not the model but `_Runner`, which
runs it as all measurements here do: the harness would tie weights again, which is not for quantized
or adapted models. Answers are kept (answer_cache), a bar shows what is left to ask, and the
harness's own output is held back.
"""

import copy
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from qtune.evaluate.answer_cache import AnswerCache, question
from qtune.evaluate.fingerprint import fingerprint
from qtune.evaluate.generate import generate_ids, stop_ids
from qtune.evaluate.intervals import interval
from qtune.evaluate.mode import measuring
from qtune.evaluate.task_score import Graded, TaskScore
from qtune.evaluate.tasks import SEED, Tasks, quiet
from qtune.model.forward import inner_model
from qtune.progress import bar
from qtune.recipe_evaluate import Evaluate

# batches that are asked before their answers are kept: enough for rows of one length to meet
BATCHES = 4
ASKED_FOR = {
    "loglikelihood": "likelihoods in tasks",
    "loglikelihood_rolling": "likelihoods of texts in tasks",
    "generate_until": "answers to tasks",
}


def run_tasks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Tasks,
    settings: Evaluate,
    name: str,
) -> list[Graded]:
    """The model's scores in tasks that `load_tasks` loaded, with how it did in each of their rows.

    `name` is what the bar calls the model.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    with quiet(), measuring(model), torch.random.fork_rng():
        torch.manual_seed(SEED)
        for task in tasks.loaded["tasks"].values():
            # each model gets the same examples in its prompts
            task.set_fewshot_seed(seed=SEED)
        lm = HFLM(
            pretrained=_Runner(model, tokenizer),
            backend="causal",
            # a copy: one without a padding token is given one
            tokenizer=copy.deepcopy(tokenizer),
            batch_size=settings.batch_size,
            softmax_dtype="float32",
        )
        found = evaluate(
            Answering(lm, AnswerCache(fingerprint(model, tokenizer)), name),
            tasks.loaded,
            limit=settings.task_limit,
            bootstrap_iters=0,
            apply_chat_template=settings.task_chat,
            fewshot_as_multiturn=settings.task_chat,
            # load_tasks has asked for it
            confirm_run_unsafe_code=True,
        )
    return [graded for task in tasks.names for graded in _graded(task, found)]


class Answering:
    """A model as the harness asks it, answering what it was asked before from the cache."""

    rank, world_size = 0, 1

    def __init__(self, lm: Any, cache: AnswerCache, name: str) -> None:
        self._lm, self._cache, self._name = lm, cache, name
        self.tokenizer_name: str = lm.tokenizer_name
        self.apply_chat_template = lm.apply_chat_template

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """For (context, continuation) the log-probability, and whether greedy decoding says it."""
        return [(value, is_top) for value, is_top in self._answers("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """For (text,) its log-probability."""
        return self._answers("loglikelihood_rolling", requests)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """For (context, settings) what the model writes, up to where these say."""
        return self._answers("generate_until", requests)

    def _answers(self, kind: str, requests: Sequence[Any]) -> list[Any]:
        questions = _questions(kind, requests)
        new = {
            key: request
            for key, request in zip(questions, requests, strict=True)
            if key not in self._cache
        }
        # longest first: what does not fit into memory fails at once; equal contexts side by side
        order = sorted(new, key=lambda key: (-len(new[key].args[0]), new[key].args[0]))
        size = self._lm.batch_size * BATCHES
        with bar(f"{ASKED_FOR[kind]}, {self._name}", len(new)) as progress:
            for first in range(0, len(order), size):
                keys = order[first : first + size]
                asked = [new[key] for key in keys]
                self._cache.add(keys, getattr(self._lm, kind)(asked, disable_tqdm=True))
                progress.advance(len(keys))
        return [self._cache[key] for key in questions]


class _Runner:
    """A model for the harness's own class: what that takes of one, and nothing it would change."""

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        inner = inner_model(model)
        self._model, self._stops = model, stop_ids(model, tokenizer)
        self.device = inner.device
        self.config = copy.copy(inner.config)
        # read by it only where it is to load the weights
        self.config.__dict__.pop("quantization_config", None)

    def __call__(self, ids: Tensor) -> Any:
        """The model's output for ids [S, T], padded on the right."""
        return self._model(input_ids=ids)

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, max_length: int, **settings: Any
    ) -> Tensor:
        """Continuations [S, at most max_length] of ids [S, T], padded on the left."""
        most = max_length - input_ids.shape[1]
        return generate_ids(
            self._model, input_ids, attention_mask, self._stops, most, settings=settings
        )


def _questions(kind: str, requests: Sequence[Any]) -> list[str]:
    """The key of each request. Of text that is drawn by lot, each draw is a question of its own."""
    drawn: Counter[str] = Counter()
    keys = []
    for request in requests:
        key = question(kind, request.args)
        if kind == "generate_until" and request.args[1].get("do_sample"):
            drawn[key] += 1
            key = question(kind, [*request.args, drawn[key]])
        keys.append(key)
    return keys


def _graded(task: str, found: Any) -> Iterator[Graded]:
    """A score of the task, or group of tasks, for each of its metrics that is a number."""
    for key, value in found["results"][task].items():
        metric, _, chosen = key.partition(",")
        if not chosen or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        values = _values(_leaves(task, found), metric, chosen, found["samples"])
        # other means than the plain one, and groups that weigh tasks alike, have no rows
        is_mean = bool(values) and math.isclose(sum(values) / len(values), value, abs_tol=1e-9)
        score = TaskScore(
            task=task,
            metric=metric if chosen == "none" else f"{metric} ({chosen})",
            value=float(value),
            standard_error=_standard_error(values) if is_mean else None,
            interval=interval(values) if is_mean else None,
            num=found["results"][task]["sample_len"] if not values else len(values),
        )
        yield Graded(score, tuple(values) if is_mean else ())


def _leaves(task: str, found: Any) -> list[str]:
    """The tasks in a group, in it or in groups of it; of a task, that one."""
    below = found["group_subtasks"].get(task)
    if below is None:
        return [task]
    return [leaf for name in below for leaf in _leaves(name, found)]


def _values(tasks: Sequence[str], metric: str, chosen: str, samples: Any) -> list[float]:
    """How the model did in each row of tasks; none where that is not a number for each."""
    rows = [row for task in tasks for row in samples[task] if row["filter"] == chosen]
    values = [row.get(metric) for row in rows]
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    return numbers if len(numbers) == len(rows) else []


def _standard_error(values: Sequence[float]) -> float | None:
    """The standard error of the mean; None of a single value."""
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    spread = math.fsum((value - mean) ** 2 for value in values)
    return math.sqrt(spread / (len(values) - 1) / len(values))
