"""Block LDLQ: GPTQ for a code book of vectors, eight columns at a time.

QuIP#, arXiv 2402.04396, section 4.1. Each vector of eight weights of a row takes the point nearest
to it once the errors of the columns before it are made up for. Then vectors are visited again and
take another point where that, given all the others, makes the layer's output error smaller: the
first ones could not know what later ones would leave. Recipes say `gptq`, which with a format of
vectors means this. Without a Hessian each vector takes the nearest point as it is.
"""

import torch
from torch import Tensor

from qtune.quant.format import Params
from qtune.quant.hessian import Note, inverse_root
from qtune.quant.linear import QuantLinear
from qtune.recipe_quant import Quant
from qtune_kernels.e8p_book import LENGTH, STEP, decode_words, nearest_words

# weights are scaled to this standard deviation; measured on SmolLM2 with errors made up for
DEVIATION = 1.0
# times that vectors are visited again
SWEEPS = 1
# columns whose errors reach the columns behind them in one product
SPAN = 128


def ldlq(
    layer: QuantLinear, weight: Tensor, hessian: Tensor | None, settings: Quant, note: Note
) -> dict[str, Tensor]:
    """What `layer.load` takes for a dense weight [O, I], given its Hessian [I, I] or None."""
    if hessian is None:
        return layer.pack(weight)
    inner = layer.inner_weight(weight.float())
    fitted = inner.square().mean().sqrt().reshape(1) / DEVIATION
    settled = layer.settle(Params(fitted.clamp_min(torch.finfo(torch.float32).tiny)))
    inner_hessian = layer.inner_hessian(hessian.float())
    regular, root = inverse_root(inner_hessian, settings.calibration.damping, note)
    target = inner / settled.params.scales
    words = _rounded(target, root.float())
    for _ in range(SWEEPS):
        _choose_again(words, target, regular.float())
    return layer.store(words, settled)


METHOD = ldlq


def _rounded(weight: Tensor, root: Tensor) -> Tensor:
    """Words, int32 [O, I / 8], of a weight [O, I] in units of the scale.

    `root` [I, I] is U, upper triangular, with U^T U the inverse of the Hessian.
    """
    rest, width = weight.clone(), weight.shape[1]
    words = torch.empty(len(rest), width // LENGTH, dtype=torch.int32, device=rest.device)
    errors = torch.empty_like(rest)
    for start in range(0, width, SPAN):
        stop = min(start + SPAN, width)
        for at in range(start, stop, LENGTH):
            here, behind = slice(at, at + LENGTH), slice(at + LENGTH, stop)
            words[:, at // LENGTH] = nearest_words(rest[:, here])
            off = rest[:, here] - _points(words[:, at // LENGTH])
            errors[:, here] = torch.linalg.solve_triangular(
                root[here, here], off, upper=True, left=False
            )
            rest[:, behind] -= errors[:, here] @ root[here, behind]
        rest[:, stop:] -= errors[:, start:stop] @ root[start:stop, stop:]
    return words


def _choose_again(words: Tensor, weight: Tensor, hessian: Tensor) -> None:
    """Change words [O, I / 8] in place where another point lessens the error E H E^T of its row."""
    off = weight - _points(words).view(weight.shape)
    pull = off @ hessian
    for place in range(words.shape[1]):
        here = slice(place * LENGTH, (place + 1) * LENGTH)
        own, now = hessian[here, here], _points(words[:, place])
        best = now + torch.linalg.solve(own, pull[:, here], left=False)
        found = nearest_words(best)
        change = _points(found) - now
        gain = change * (2 * pull[:, here] - change @ own)
        better = gain.sum(1) > 0
        words[:, place] = torch.where(better, found, words[:, place])
        pull -= change.where(better[:, None], 0.0) @ hessian[here]


def _points(words: Tensor) -> Tensor:
    """The points of words [...], float32 [N, 8]."""
    return decode_words(words.reshape(-1)) * STEP
