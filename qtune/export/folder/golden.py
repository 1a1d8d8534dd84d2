"""Golden prompts: a few held-out requests with what the reloaded export answers to them.

They are what can still be checked where qtune is not: after a copy, a conversion, behind a server.
So each is kept as token ids, as text and as messages, and of each token of the answer the likeliest
candidates with their log-probabilities. A later model reads prompt and expected answer in one
forward pass, so that one different token does not hide what comes after it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qtune.data.chat import prompt_ids
from qtune.data.presented import presented
from qtune.data.rows import Message, Row
from qtune.data.sample import Sample
from qtune.data.template import renderer
from qtune.data.tokens import tokenise

NUM_PROMPTS = 3
# longer ones would make qtune.json long, and cost time wherever they are played
LONGEST = 1024
# of plain text, which has no question and answer
BEGINNING = 32
# candidates for each token of an answer
TOP = 5
# nats by which log-probabilities may move: rounding in kernels moves them by about 0.02
MAX_CHANGE = 0.1
# nats between two candidates that rounding may swap
TIE = 2 * MAX_CHANGE
# log-probabilities are written with so many decimals; JSON has no infinity
DECIMALS, LOWEST = 4, -100.0


@dataclass(frozen=True)
class Prompt:
    """A request as the model reads it; `messages` and `tools` are those of a conversation.

    `text` is what `prompt_ids` are the tokens of; None where no text gives just these.
    """

    prompt_ids: list[int]
    text: str | None
    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Swap:
    """A token of an answer, by its index in it, that is another one: the ids of both."""

    index: int
    expected: int
    found: int


@dataclass(frozen=True)
class Replay:
    """A golden prompt answered again.

    `change` is by how many nats log-probabilities of the likely candidates moved on average,
    `first` the first token that is another one; None where all are the same, or where rounding may
    decide.
    """

    change: float
    first: Swap | None = None


def prompts(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], samples: Sequence[Sample]
) -> list[Prompt]:
    """A few prompts: test rows, or the beginnings of held-out samples where there are none.

    Raises UserError where the chat template refuses a row.
    """
    made: list[Prompt] = []
    for row in rows:
        prompt = of_row(tokenizer, row)
        if len(prompt.prompt_ids) <= LONGEST:
            made.append(prompt)
        if len(made) == NUM_PROMPTS:
            return made
    beginnings = (_beginning(samples[i]) for i in range(min(NUM_PROMPTS, len(samples))))
    return made or [of_ids(tokenizer, ids[-LONGEST:]) for ids in beginnings if ids]


def of_row(tokenizer: PreTrainedTokenizerBase, row: Row) -> Prompt:
    """The prompt for the last message of a row. UserError: the chat template refuses it."""
    ids = prompt_ids(tokenizer, row.messages[:-1], row.tools, row.plain)
    if row.plain:
        return of_ids(tokenizer, ids)
    # as the template takes them: a server runs it on just these
    messages = presented(partial(renderer, tokenizer), row.messages[:-1], row.tools)
    text = renderer(tokenizer, row.tools)(messages, add_generation_prompt=True)
    return Prompt(ids, text, messages, row.tools)


def of_ids(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> Prompt:
    """The prompt of token ids, with its text if that has these tokens."""
    text = str(tokenizer.decode(list(ids)))
    same = tokenise(tokenizer, text)[0] == list(ids)
    return Prompt(list(ids), text if same else None)


def entry(
    prompt: Prompt, answer: Sequence[int], text: str, log_probabilities: Tensor
) -> dict[str, Any]:
    """What qtune.json keeps of a prompt with its greedy answer, whose log-probabilities are [A, V].

    `answer` ends with the stop token if there was one, `text` is the answer without it.
    """
    values = log_probabilities.clamp_min(LOWEST)
    top = values.topk(min(TOP, values.shape[-1]))
    own = values.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
    return asdict(prompt) | {
        "greedy_ids": list(answer),
        "greedy_text": text,
        "greedy_logprobs": _rounded(own),
        "top_ids": top.indices.tolist(),
        "top_logprobs": [_rounded(row) for row in top.values],
    }


def compare(golden: dict[str, Any], log_probabilities: Tensor) -> Replay:
    """How log-probabilities [A, V] of a prompt's expected answer are those of its entry."""
    ids, expected = torch.tensor(golden["top_ids"]), torch.tensor(golden["top_logprobs"])
    found = log_probabilities.clamp_min(LOWEST).gather(1, ids)
    weight = expected.exp()
    moved = (weight * (found - expected).abs()).sum(-1) / weight.sum(-1)
    change = float(moved.mean())
    for i, best in enumerate(log_probabilities.argmax(-1).tolist()):
        wanted = golden["greedy_ids"][i]
        if best != wanted and not is_tie(golden, i, best):
            return Replay(change, Swap(i, wanted, best))
    return Replay(change)


def is_tie(golden: dict[str, Any], i: int, token: int) -> bool:
    """Whether another token at place `i` of the answer was about as likely as the expected one."""
    known = dict(zip(golden["top_ids"][i], golden["top_logprobs"][i], strict=True))
    return token in known and golden["greedy_logprobs"][i] - known[token] <= TIE


def _beginning(sample: Sample) -> list[int]:
    """The tokens before the first that is learned; of plain text, learned throughout, a few."""
    learned = sample.supervised
    first = learned.index(True) if True in learned else len(learned)
    end = first if first > 1 else min(BEGINNING, len(learned) // 2)
    return list(sample.ids[:end])


def _rounded(values: Tensor) -> list[float]:
    return [round(value, DECIMALS) for value in values.tolist()]
