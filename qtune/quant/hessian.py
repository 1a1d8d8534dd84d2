"""The Hessian of a layer's output error, made fit to be factored.

Over calibration text the mean squared change of a layer's outputs is tr(E H E^T), with E the change
of its weight and H the mean of x^T x over its inputs x. H is singular where there are fewer tokens
than inputs, or inputs that are always 0; rounding can make it indefinite. So a part of its mean
diagonal is added to the diagonal, more where that is not enough. Factors are computed in float64:
one input can be a million times stronger than others.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from qtune.errors import UserError

# told what is worth knowing of a layer; whoever passes it knows the layer's name
Note = Callable[[str], None]
# beyond this nothing of the Hessian is left: rounding errors do not need so much
MOST_DAMPING = 1e4


def damped(hessian: Tensor, damping: float, note: Note) -> tuple[Tensor, Tensor]:
    """The positive definite Hessian [I, I] and its Cholesky factor L [I, I], both float64.

    `damping`, in parts of the mean of the diagonal, is raised tenfold until the factor exists.
    Inputs that were always 0, and damping raised, are said to `note`. Raises UserError where the
    Hessian is not finite, or has eigenvalues far below 0.
    """
    regular = hessian.to(torch.float64, copy=True)
    if not torch.isfinite(regular).all():
        raise UserError(
            "the inputs of this layer in the calibration text are not all finite; check the model "
            "and its dtype, or set quant.method: nearest"
        )
    mean, added = _mean_diagonal(regular, note), 0.0
    while damping <= MOST_DAMPING:
        # in place: of a wide layer one of these takes gigabytes
        regular.diagonal().add_((damping - added) * mean)
        lower, failed = torch.linalg.cholesky_ex(regular)
        if not failed:
            return regular, lower
        added, damping = damping, 10 * damping
        note(f"Hessian not positive definite: damping raised to {damping:g}")
    raise UserError(
        "the Hessian of this layer has eigenvalues far below 0, so it is no mean of x^T x"
    )


def inverse_root(hessian: Tensor, damping: float, note: Note) -> tuple[Tensor, Tensor]:
    """The damped Hessian H, and U upper triangular with U^T U = H^-1, both float64 [I, I]."""
    # the factor of H read backwards, inverted and read backwards again, is upper triangular
    regular, lower = damped(hessian.flip(0, 1), damping, note)
    eye = torch.eye(len(lower), device=lower.device, dtype=lower.dtype)
    inverse = torch.linalg.solve_triangular(lower, eye, upper=False)
    return regular.flip(0, 1), inverse.flip(0, 1)


def _mean_diagonal(hessian: Tensor, note: Note) -> float:
    """The mean of the diagonal; 1 where it is 0 throughout."""
    diagonal = hessian.diagonal()
    silent = int((diagonal == 0).sum())
    if silent:
        note(f"{silent} of {len(diagonal)} inputs are 0 throughout the calibration text")
    return float(diagonal.mean()) if silent < len(diagonal) else 1.0
