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
from transformers import PreTrainedModel

from qtune.errors import UserError
from qtune.export.exporter import load_exporter
from qtune.export.folder import manifest
from qtune.export.folder.companions import write_json
from qtune.model.folder import read_json

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
    path = folder / manifest.NAME
    if not path.is_file():
        raise UserError(f"{folder} is no export of qtune: it has no {manifest.NAME}")
    written = read_json(path).get("export")
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


@torch.no_grad()
def add_golden(
    folder: Path, model: Model, prompt: Sequence[int], *, max_new_tokens: int = 16
) -> None:
    """Add the reloaded model's greedy answer to `prompt` to qtune.json, for checks elsewhere."""
    with _evaluating(model):
        ids = torch.tensor([list(prompt)], device=model.device)
        generate: Any = model.generate
        whole = generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, use_cache=True,
            max_new_tokens=max_new_tokens,
        )  # fmt: skip
    golden: dict[str, Any] = {
        "prompt_ids": list(prompt),
        "greedy_ids": whole[0, len(prompt) :].tolist(),
    }
    path = folder / manifest.NAME
    write_json(path, read_json(path) | {"golden": golden})


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
