"""What makes logits of a causal LM's last hidden states, where that is known exactly.

A frozen linear layer, then for some models a factor (Granite divides by it, Cohere multiplies) and
a soft cap (Gemma): losses can then be had without the logits (`qtune_kernels.cross_entropy`).
Configurations name these numbers but do not say what is done with them, so what they seem to say is
tried on a few tokens against the model's own logits, once for each model. Whatever does not agree,
and heads that are quantized, adapted or trained, have no Head: they take the way through logits.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qtune.data.collate import Batch
from qtune.model.forward import PRIME, forward_hidden, forward_logits, inner_model
from qtune_kernels.cross_entropy import chunk_rows, linear_token_losses, token_losses

# by what logits are multiplied or divided in the configurations of transformers
FACTORS = ("logits_scaling", "logit_scale", "lm_head_multiplier")
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")
# tokens of the check
PROBE_TOKENS = 8
# relative to the logits' norm: roundings to 16 bits make 0.004, the wrong factor 0.5 or more
MOST_DIFFERENCE = 0.02


@dataclass(frozen=True)
class _Finish:
    """What is done with the output of the linear layer: x = softcap tanh(scale z / softcap)."""

    softcap: float | None
    scale: float

    def __call__(self, z: Tensor) -> Tensor:
        z = z * self.scale
        return z if self.softcap is None else torch.tanh(z / self.softcap) * self.softcap


# what the check found; None: no guess was right
_checked: WeakKeyDictionary[PreTrainedModel, _Finish | None] = WeakKeyDictionary()


@dataclass(frozen=True)
class Head:
    """A frozen output head whose loss can be computed from hidden states."""

    layer: nn.Linear
    finish: _Finish

    def token_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """-log p of targets int64 [N] after hidden states [N, I], float32 [N], differentiable."""
        weight, bias = self.layer.weight, self.layer.bias
        # some models compute in a wider dtype up to here
        hidden = hidden.to(weight.dtype)
        softcap, scale = self.finish.softcap, self.finish.scale
        return linear_token_losses(hidden, weight, targets, bias, softcap, scale)

    def logits_bytes(self, num_targets: int, device: torch.device) -> int:
        """Bytes of the logits that `token_losses` holds at a time on the device."""
        vocabulary, dtype = self.layer.out_features, self.layer.weight.dtype
        return chunk_rows(num_targets, vocabulary, dtype, device) * vocabulary * dtype.itemsize


def losses_of_targets(model: nn.Module, batch: Batch) -> Tensor:
    """-log p of each of the batch's targets, float32 [N]; gradients flow.

    Logits of chunks of tokens are made one after the other, where the head is known.
    """
    head = output_head(model)
    if head is None:
        return token_losses(forward_logits(model, batch), batch.targets)
    return head.token_losses(forward_hidden(model, batch), batch.targets)


def output_head(model: nn.Module) -> Head | None:
    """The model's head, checked on the first call; None where its logits have to be made.

    On `meta`, where nothing can be checked, what the configuration seems to say is believed.
    """
    inner = inner_model(model)
    layer = inner.get_output_embeddings()
    # subclasses are quantized or adapted
    if type(layer) is not nn.Linear or inner.base_model is inner:
        return None
    if any(parameter.requires_grad for parameter in layer.parameters()):
        return None
    if layer.weight.is_meta:
        return Head(layer, next(_guesses(inner)))
    if inner not in _checked:
        _checked[inner] = _check(inner, layer)
    finish = _checked[inner]
    return None if finish is None else Head(layer, finish)


def _guesses(inner: PreTrainedModel) -> Iterator[_Finish]:
    config = inner.config.get_text_config()
    softcap = next((cap for name in SOFTCAPS if (cap := getattr(config, name, None))), None)
    softcap = None if softcap is None else float(softcap)
    yield _Finish(softcap, 1.0)
    for name in FACTORS:
        if factor := getattr(config, name, None):
            yield _Finish(softcap, 1 / factor)
            yield _Finish(softcap, factor)


def _check(inner: PreTrainedModel, layer: nn.Linear) -> _Finish | None:
    """The guess that makes the model's own logits of its hidden states; None if none does."""
    batch = _probe(inner)
    with measuring(inner):
        truth = forward_logits(inner, batch).float()
        hidden = forward_hidden(inner, batch)
        if hidden.shape[-1] != layer.in_features:
            return None
        z = layer(hidden.to(layer.weight.dtype)).float()
    if z.shape != truth.shape:
        return None
    differences = {guess: float((guess(z) - truth).norm()) for guess in _guesses(inner)}
    best = min(differences, key=lambda guess: differences[guess])
    # forbidden tokens make both sides infinite
    return best if differences[best] < MOST_DIFFERENCE * float(truth.norm()) else None


def _probe(inner: PreTrainedModel) -> Batch:
    """One sample of tokens from all over the vocabulary, each of which is predicted from."""
    positions = torch.arange(PROBE_TOKENS, device=inner.device)
    ids = (positions + 1) * PRIME % inner.config.get_text_config().vocab_size
    return Batch(
        input_ids=ids[None],
        position_ids=positions[None],
        targets=ids,
        predicts=positions,
        lengths=[PROBE_TOKENS],
        places=[],
        weights=None,
        sample_of=torch.zeros_like(positions),
        num_parts=[1],
        labels=[None],
    )


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """No gradients and no dropout, so no random numbers are drawn; then every part as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
