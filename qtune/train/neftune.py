"""NEFTune (arXiv 2310.05914): uniform noise on the embeddings of training samples.

A sample of L tokens with embeddings of H numbers gets noise of at most alpha / sqrt(L H) on each of
them. Samples of a packed row have lengths of their own, so the noise goes by token, and filling has
no part in L. It comes from PyTorch's own random numbers, as dropout does, which checkpoints hold: a
resumed run draws the same.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qtune.model.forward import inner_model


@contextmanager
def noisy_embeddings(
    model: nn.Module, alpha: float | None, lengths: Sequence[int]
) -> Iterator[None]:
    """Meanwhile the model's embeddings are noisy while it is in training mode; None: they are not.

    `lengths` are those of the samples in the batch, which are one packed row or a row each.
    """
    if alpha is None:
        yield
        return

    def add_noise(embeddings: nn.Module, args: Any, output: Tensor) -> Tensor:
        if not embeddings.training:
            return output
        most = alpha / (_lengths_of_tokens(output, lengths) * output.shape[-1]).sqrt()
        noise = torch.empty_like(output).uniform_(-1, 1)
        return output + noise * most[..., None].to(output.dtype)

    hook = inner_model(model).get_input_embeddings().register_forward_hook(add_noise)
    try:
        yield
    finally:
        hook.remove()


def _lengths_of_tokens(rows: Tensor, lengths: Sequence[int]) -> Tensor:
    """How long the samples are that the tokens of rows [S, T, H] belong to, [S, T] or [S, 1]."""
    of_samples = torch.tensor(lengths)
    if len(rows) == len(lengths):
        return of_samples.to(rows.device)[:, None]
    return of_samples.repeat_interleave(of_samples).to(rows.device)[None]
