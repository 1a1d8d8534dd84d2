"""Greedy answers to many prompts at once, through transformers' own `generate`.

A loop of our own gave the same tokens no faster: the time goes into the matrices, which a step
reads (and a quantized layer unpacks) once for all rows of a batch. Rows of similar length share a
batch, so that little of it is padding. Decoding is plain: a sampling temperature or repetition
penalty that the model recommends for chatting would blur the comparison of two models.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from qtune.data.chat import end_of_turn, prompt_ids
from qtune.data.rows import Row
from qtune.evaluate.mode import measuring
from qtune.model.forward import inner_model, takes_logits_to_keep
from qtune.progress import Bar
from qtune.quant.linear import unpacked

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Answers:
    """One text per row, in the order of the rows, and what they took to make."""

    texts: list[str]
    num_tokens: int  # generated, the stop tokens among them
    seconds: float  # reading the prompts included

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second over all rows."""
        return self.num_tokens / self.seconds


def answer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    on_progress: Progress | None = None,
) -> Answers:
    """What the model answers to each row's messages but the last, which is the expected answer.

    `on_progress(done, total)` is called after each batch. Raises UserError where the chat template
    refuses a conversation.
    """
    prompts = [prompt_ids(tokenizer, row.messages[:-1], row.tools, row.plain) for row in rows]
    stops = stop_ids(model, tokenizer)
    answers: list[list[int]] = [[] for _ in rows]
    # longest first: what does not fit into memory fails at once
    longest_first = sorted(range(len(rows)), key=lambda i: -len(prompts[i]))
    start = time.perf_counter()
    with measuring(model):
        for first in range(0, len(rows), batch_size):
            batch = longest_first[first : first + batch_size]
            made = _continued(model, [prompts[i] for i in batch], stops, max_new_tokens)
            for i, ids in zip(batch, made, strict=True):
                answers[i] = ids
            if on_progress is not None:
                on_progress(first + len(batch), len(rows))
    seconds = time.perf_counter() - start
    texts = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in answers]
    return Answers(texts, sum(map(len, answers)), seconds)


def moving(bar: Bar) -> Progress:
    """An `on_progress` that moves a bar on."""
    done = 0

    def move(now: int, total: int) -> None:
        nonlocal done
        bar.advance(now - done)
        done = now

    return move


def stop_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Sorted ids that end an answer: of generation config, tokenizer and chat template."""
    configured = inner_model(model).generation_config.eos_token_id
    several = configured if isinstance(configured, list) else [configured]
    turn_end = end_of_turn(tokenizer) if tokenizer.chat_template else None
    found = {*several, tokenizer.eos_token_id, turn_end}
    return sorted(found - {None})


def generate_ids(
    model: nn.Module,
    prompts: Tensor,
    live: Tensor,
    stops: list[int],
    max_new_tokens: int,
    streamer: BaseStreamer | None = None,
    cache: Cache | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Tensor:
    """Greedy continuations [S, T + new] int64 of prompts [S, T], where `live` is 0 on padding.

    A row that has ended is filled up with token 0 behind its stop token. Keys and values go into
    `cache`, an empty one, or into an ordinary one. `settings` of transformers' `generate` may
    ask for something else than all that.
    """
    generate = cast(Callable[..., Tensor], model.generate)
    config = _greedy(max_new_tokens, stops)
    beside = config.update(**(settings or {}))
    with unpacked(model):
        return generate(
            input_ids=prompts,
            attention_mask=live,
            generation_config=config,
            streamer=streamer,
            past_key_values=cache,
            **_last_logits_only(model, prompts.device),
            **beside,
        )


def _greedy(max_new_tokens: int, stops: list[int]) -> GenerationConfig:
    """Plain greedy decoding, spelt out: `generate` fills gaps with what the model recommends."""
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        use_cache=True,
        eos_token_id=stops or None,
        pad_token_id=0,
    )


def _last_logits_only(model: nn.Module, device: torch.device) -> dict[str, Any]:
    """Arguments of `generate` for logits at the last position alone, where the model can do that.

    By default `generate` asks for a slice, whose rows are not contiguous: to multiply them by the
    head, the CPU copies the whole head once per row, which takes gigabytes, and longer than all
    layers take to read the prompts.
    """
    if not takes_logits_to_keep(inner_model(model)):
        return {}
    return {"logits_to_keep": torch.tensor([-1], device=device)}


def _continued(
    model: nn.Module, prompts: list[list[int]], stops: list[int], max_new_tokens: int
) -> list[list[int]]:
    """Generated ids per prompt, up to the first stop token, that one included."""
    device = inner_model(model).device
    longest = max(map(len, prompts))
    ids = _left_padded(prompts, longest).to(device)
    live = _left_padded([[1] * len(prompt) for prompt in prompts], longest).to(device)
    made = generate_ids(model, ids, live, stops, max_new_tokens)
    return [_until_stop(row, stops) for row in made[:, longest:].tolist()]


def _left_padded(rows: list[list[int]], width: int) -> Tensor:
    return torch.tensor([[0] * (width - len(row)) + row for row in rows])


def _until_stop(ids: list[int], stops: list[int]) -> list[int]:
    end = next((i + 1 for i, token in enumerate(ids) if token in stops), len(ids))
    return ids[:end]
