"""Part (a): every op and its gradients on random odd shapes, against float64.

An op may be at most twice as far from the float64 truth as plain PyTorch in the same dtype. Inputs
lie between NaN and every new buffer starts as NaN, so that a read beyond the end or an output that
was not written shows. Decoding and encoding must agree bit for bit with the plain version.
"""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpu import linear_problems, op_problems
from gpu.case import Case, Context, finite
from gpu.problem import Exact, Problem

ALLOWED = 2.0
GUARD = 256
DRAWS = 5


def cases(context: Context) -> list[Case]:
    """One case for each draw of each op."""
    makers = {**linear_problems.MAKERS, **op_problems.MAKERS}
    draws = 1 if context.quick else DRAWS
    return [
        Case(f"{name} {draw}", _Run(context, name, make, draw))
        for name, make in makers.items()
        for draw in range(draws)
    ]


class _Run(NamedTuple):
    """A draw of an op, made only when it is its turn."""

    context: Context
    name: str
    make: Callable[[random.Random, Context], Problem | Exact]
    draw: int

    def __call__(self) -> dict[str, Any]:
        seed = f"{self.context.seed} {self.name} {self.draw}"
        torch.manual_seed(random.Random(seed).getrandbits(32))
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        problem = self.make(random.Random(seed), self.context)
        row = _exact(problem) if isinstance(problem, Exact) else _close(problem)
        return {"op": self.name.split(",")[0], **problem.facts, **row}


def _exact(problem: Exact) -> dict[str, Any]:
    """Whether each output has the same bits as the plain version's."""
    pairs = zip(_tuple(problem.op()), _tuple(problem.plain()), strict=True)
    equal = [torch.equal(ours.cpu(), plain.cpu()) for ours, plain in pairs]
    return {"equal": equal, "ok": all(equal)}


def _close(problem: Problem) -> dict[str, Any]:
    """The error of each output and gradient beside that of plain PyTorch."""
    inputs = [_guarded(tensor) for tensor in problem.inputs]
    truth = _results(problem.plain, [tensor.double() for tensor in inputs])
    plain = _results(problem.plain, inputs, truth)
    ours = _results(problem.op, inputs, truth)
    # half a step of the output's dtype is what a single rounding costs
    floor = torch.finfo(problem.inputs[0].dtype).eps / 8
    pairs = [
        (error(mine, exact), error(other, exact))
        for mine, other, exact in zip(ours, plain, truth, strict=True)
    ]
    ok = all(mine <= ALLOWED * other + floor for mine, other in pairs)
    return {"errors": [[finite(each) for each in pair] for pair in pairs], "ok": ok}


def _results(
    run: Callable[..., Any], inputs: Sequence[Tensor], like: Sequence[Tensor] = ()
) -> list[Tensor]:
    """Outputs, then gradients of all inputs for random gradients of the outputs."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    outputs = _tuple(run(*leaves))
    generator = torch.Generator().manual_seed(1)
    slopes = [torch.randn(out.shape, generator=generator).to(out) for out in outputs]
    torch.autograd.backward(outputs, slopes)
    return [out.detach() for out in outputs] + [leaf.grad for leaf in leaves]


def error(result: Tensor, truth: Tensor) -> float:
    """The relative root mean square error; NaN where anything in the result is, or its shape."""
    if result.shape != truth.shape:
        return math.nan
    difference = (result.double() - truth).norm()
    return float(difference / truth.norm().clamp(min=1e-30))


def _guarded(tensor: Tensor) -> Tensor:
    """The same values with NaN before and behind them."""
    buffer = tensor.new_full((tensor.numel() + 2 * GUARD,), torch.nan)
    buffer[GUARD:-GUARD] = tensor.reshape(-1)
    return buffer[GUARD:-GUARD].view(tensor.shape)


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
