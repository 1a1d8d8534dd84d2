"""Exports loaded again with the library they are for, and compared with the model they should be.

Logits are compared relative to their spread over the vocabulary, which needs no knowledge of the
task: kernels that round differently move them by a few percent, a wrong tensor by far more.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from qtune.errors import UserError
from qtune.export.exporter import load_exporter
from qtune.export.folder import golden, manifest
from qtune.export.folder.companions import write_json
from qtune.export.folder.golden import Prompt

Model = PreTrainedModel | PeftModel
# largest change of logits, relative to their spread, that rounding explains (30 layers: 0.04)
MAX_CHANGE = 0.1


@dataclass(frozen=True)
class Agreement:
    """How far logits are from the expected ones.

    `change` is the root mean square difference over the spread of the expected logits, `kl` the
    mean of KL(expected || found) per token, `top1` the share of tokens with the same best next
    token.
    """

    change: float
    kl: float
    top1: float


def reload(name: str, folder: Path, base_folder: Path, device: torch.device) -> Model:
    """The exported model, ready for evaluation, as the library it is for loads it.

    `base_folder` is the 16-bit model that an adapter goes onto. Raises UserError for a library that
    is missing and for a folder that is no such export.
    """
    written = manifest.read(folder)["export"]
    if written != name:
        raise UserError(f"{folder} is an export of the kind '{written}', not '{name}'")
    return load_exporter(name).load(folder, base_folder, device)


@torch.no_grad()
def check_logits(
    model: Model, expected: Model, rows: Sequence[Sequence[int]], *, max_change: float = MAX_CHANGE
) -> Agreement:
    """How `model` agrees with `expected` over rows of token ids.

    Raises UserError that names the row and position where they differ most, if they differ too
    much.
    """
    results = [_compare(_logits(model, row), _logits(expected, row)) for row in rows]
    change, kl, same = (torch.cat(parts) for parts in zip(*results, strict=True))
    found = Agreement(*(float(t.double().mean()) for t in (change, kl, same)))
    # not `change > limit`: NaN must fail
    if not found.change <= max_change:
        worst = [float(parts[0].nan_to_num(torch.inf).max()) for parts in results]
        row = worst.index(max(worst))
        token = int(results[row][0].nan_to_num(torch.inf).argmax())
        raise UserError(
            "the reloaded model differs from the one that was exported: logits by "
            f"{found.change:.1%} (limit {max_change:.1%}), KL {found.kl:.4f} per token, same best "
            f"token in {found.top1:.0%}; most in row {row + 1} at token {token + 1} "
            f"({worst[row]:.1%})"
        )
    return found


def add_golden(
    folder: Path,
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 32,
) -> None:
    """Put the reloaded model's greedy answers to `prompts` into qtune.json, for checks elsewhere.

    An answer stops at the stop ids that are written there.
    """
    written = manifest.read(folder)
    entries = []
    for prompt in prompts:
        answer = _greedy(model, prompt.prompt_ids, written["stop_ids"], max_new_tokens)
        text = str(tokenizer.decode(answer, skip_special_tokens=True))
        found = answer_log_probabilities(model, prompt.prompt_ids, answer)
        entries.append(golden.entry(prompt, answer, text, found))
    write_json(folder / manifest.NAME, written | {"golden": entries})


def answer_log_probabilities(model: Model, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """Log-probabilities [A, V], float32 on the CPU, of each token of an answer to a prompt.

    Each is given the tokens of the answer before it.
    """
    logits = _logits(model, [*prompt, *answer[:-1]])
    return logits[-len(answer) :].log_softmax(-1)


@torch.no_grad()
def _greedy(
    model: Model, prompt: Sequence[int], stops: list[int], max_new_tokens: int
) -> list[int]:
    """The greedy answer, with the stop token that ends it if one does."""
    # spelt out: `generate` fills gaps with what the model recommends
    plain = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, temperature=1.0, top_p=1.0,
        top_k=50, repetition_penalty=1.0, no_repeat_ngram_size=0, use_cache=True,
        eos_token_id=stops or None, pad_token_id=0,
    )  # fmt: skip
    with _evaluating(model):
        ids = torch.tensor([list(prompt)], device=model.device)
        generate: Any = model.generate
        whole = generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=plain
        )
    answer: list[int] = whole[0, len(prompt) :].tolist()
    return answer


@torch.no_grad()
def _logits(model: Model, row: Sequence[int]) -> Tensor:
    """Logits [T, V] of one row of token ids, float32 on the CPU."""
    with _evaluating(model):
        ids = torch.tensor([list(row)], device=model.device)
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[0].float().cpu()


def _compare(found: Tensor, expected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per token [T]: relative change, KL(expected || found), whether the best token is the same."""
    if found.shape != expected.shape:
        raise UserError(
            f"the reloaded model has logits {list(found.shape)}, not {list(expected.shape)}"
        )
    # a constant added to all logits of a token changes nothing
    found, expected = (t - t.mean(-1, keepdim=True) for t in (found, expected))
    change = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    log_p, log_q = expected.log_softmax(-1), found.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return change, kl, found.argmax(-1) == expected.argmax(-1)


@contextmanager
def _evaluating(model: Model) -> Iterator[None]:
    """Dropout off for the time being."""
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)
