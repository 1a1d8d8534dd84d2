"""How well a model predicts held-out answers, and how far its distributions are from another's.

The loss is the mean cross entropy over all supervised tokens of all batches (not a mean of means),
in float32, summed in float64; tokens with a weight count so many times, as they do in training.
Perplexity is its exponential.

KL and top-1 agreement compare whole distributions with those of a Reference, the trained model. A
Reference keeps log-probabilities in float16 of the first supervised tokens only, 2 bytes times the
vocabulary each (1500 tokens at 49k entries: 150 MB), so memory is bounded. Float16 moves a
log-probability by up to 2^-11 of itself; after normalising again, which keeps KL >= 0, a model
measured against itself shows a KL below 1e-6. What limits the comparison is the model's own dtype:
one bf16 model computed in two ways (packed, one sample per row) was 1.6e-3 from itself, with 98.9 %
top-1 agreement.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qtune.data.collate import Batch
from qtune.evaluate.mode import measuring
from qtune.model.forward import forward_logits

# enough for two digits of a KL; more costs memory, not precision worth having
KEPT_TOKENS = 1500
# tokens at a time: a few dozen MiB in float32 at the vocabularies in use
ROWS = 64
# its exponential is 0 in every dtype, and times 0 it is no NaN
LOWEST = torch.finfo(torch.float16).min
# numbers by sample
Sums = defaultdict[int, float]


@dataclass(frozen=True)
class Reference:
    """What a model thought of the first K supervised tokens, on the CPU."""

    log_probabilities: Tensor  # [K, V] float16
    top: Tensor  # [K] int64, the likeliest token
    targets: Tensor  # [K] int64


@dataclass(frozen=True)
class SampleLoss:
    """The cross entropy of one sample: a weighted sum over its targets, and the sum of weights."""

    loss: float
    weight: float


@dataclass(frozen=True)
class Likelihood:
    """Mean cross entropy of `tokens` supervised tokens, and the distance from a reference.

    `kl` is KL(reference || model) per token in nats, `top1` the share of tokens where both have the
    same likeliest token, over `compared` tokens; None without a reference.
    """

    loss: float
    tokens: int
    kl: float | None = None
    top1: float | None = None
    compared: int = 0
    kept: Reference | None = None
    samples: list[SampleLoss] = field(default_factory=list)
    """One for each sample that has targets, in the order of the batches."""

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that is beyond a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def held_out(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    reference: Reference | None = None,
    keep_tokens: int = 0,
) -> Likelihood:
    """The likelihood of the batches' targets under the model.

    With `keep_tokens`, `kept` becomes the Reference made of the first that many targets. A
    `reference` must come from the same batches; ValueError where it does not, or where there is no
    target at all.
    """
    if not sum(len(batch.targets) for batch in batches):
        raise ValueError("there is no supervised token in the held-out batches")
    totals = _Totals(reference, keep_tokens)
    with measuring(model):
        for piece in _pieces(model, batches):
            totals.add(*piece)
    return totals.result()


class _Totals:
    """Sums over tokens, fed a few rows of logits at a time."""

    def __init__(self, reference: Reference | None, keep_tokens: int) -> None:
        self.reference, self.keep_tokens = reference, keep_tokens
        self.tokens = self.compared = self.agreed = 0
        self.kl = 0.0
        self.losses: Sums = defaultdict(float)
        self.weights: Sums = defaultdict(float)
        self.kept: list[Reference] = []

    def add(self, logits: Tensor, targets: Tensor, weights: Tensor, samples: Tensor) -> None:
        """Take in logits [n, V] for targets [n] of the samples [n], with weights [n]."""
        q = torch.log_softmax(logits, -1, dtype=torch.float32)
        found = q.gather(1, targets.unsqueeze(1)).squeeze(1)
        # where there is a GPU, one transfer of few numbers
        losses = -(weights * found).double().cpu()
        _add_each(self.losses, samples, losses)
        _add_each(self.weights, samples, weights.double().cpu())
        self._keep(q[: max(0, self.keep_tokens - self.tokens)], targets)
        if self.reference is not None:
            self._compare(q, targets, self.reference)
        self.tokens += len(targets)

    def result(self) -> Likelihood:
        """The means."""
        kept = _joined(self.kept) if self.kept else None
        samples = [SampleLoss(loss, self.weights[i]) for i, loss in sorted(self.losses.items())]
        loss = math.fsum(s.loss for s in samples) / math.fsum(s.weight for s in samples)
        if self.reference is None:
            return Likelihood(loss, self.tokens, kept=kept, samples=samples)
        if self.compared != len(self.reference.targets):
            raise ValueError("the reference was made with more held-out tokens than there are")
        kl, top1 = self.kl / self.compared, self.agreed / self.compared
        return Likelihood(loss, self.tokens, kl, top1, self.compared, kept, samples)

    def _keep(self, q: Tensor, targets: Tensor) -> None:
        if len(q):
            stored = q.clamp_min(LOWEST).half().cpu()
            self.kept.append(Reference(stored, q.argmax(-1).cpu(), targets[: len(q)].cpu()))

    def _compare(self, q: Tensor, targets: Tensor, reference: Reference) -> None:
        here = slice(self.tokens, self.tokens + len(q))
        kept_targets = reference.targets[here]
        num = len(kept_targets)
        if not torch.equal(kept_targets, targets[:num].cpu()):
            raise ValueError("the reference was made with other held-out tokens")
        q = q[:num].clamp_min(LOWEST)
        stored = reference.log_probabilities[here].to(q.device)
        p = torch.log_softmax(stored, -1, dtype=torch.float32)
        self.kl += (p.exp() * (p - q)).sum(dtype=torch.float64).item()
        self.agreed += int((q.argmax(-1).cpu() == reference.top[here]).sum())
        self.compared += num


def _pieces(
    model: nn.Module, batches: Sequence[Batch]
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Logits [n, V], targets, weights and numbers of samples [n], few rows at a time."""
    first = 0
    for batch in batches:
        if len(batch.targets):
            weights = batch.weights
            if weights is None:
                weights = torch.ones_like(batch.targets, dtype=torch.float32)
            samples = first + batch.sample_of
            rows = forward_logits(model, batch), batch.targets, weights, samples
            yield from zip(*(torch.split(tensor, ROWS) for tensor in rows), strict=True)
        first += len(batch.lengths)


def _add_each(sums: Sums, samples: Tensor, values: Tensor) -> None:
    """Add the values [n] of samples [n], which come in order, to the sums of these."""
    found, places = samples.unique_consecutive(return_inverse=True)
    totals = torch.zeros(len(found), dtype=torch.float64).index_add_(0, places, values)
    for sample, total in zip(found.tolist(), totals.tolist(), strict=True):
        sums[sample] += total


def _joined(parts: list[Reference]) -> Reference:
    return Reference(
        torch.cat([part.log_probabilities for part in parts]),
        torch.cat([part.top for part in parts]),
        torch.cat([part.targets for part in parts]),
    )
