"""How fast a run is: tokens per second, and what that is of what the device can do.

Tokens are those of a whole optimizer step, over all its micro-batches and processes, and so are the
seconds: figures do not depend on how a step is split up. All tokens and supervised ones are told
apart, since a run that learns from few of its tokens is not faster for reading many.

MFU (arXiv 2204.02311, appendix B) is the useful arithmetic over the devices' measured rate for bf16
matrix products. Useful are 2 operations per weight and token forward, 2 for the gradient of the
layer's input, and 2 for that of the weight where it, or its scales, are trained; for the output
head that times supervised tokens only, and of experts the share that a token takes. Not useful, and
not counted: what is computed a second time to save memory, filling, passes of a reference model.
The products within attention are left out too, so long rows read a little low.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from qtune.model.forward import inner_model
from qtune.model.scales import TrainedScales


class Meter:
    """A stopwatch for optimizer steps; what lies between two steps is not timed.

    `matrix_flops_per_s` is the measured rate of one device; without it there is no MFU.
    """

    def __init__(
        self, model: nn.Module, matrix_flops_per_s: float | None, num_processes: int
    ) -> None:
        self._per_token, self._per_target = step_flops(model)
        self._rate, self._num_processes = matrix_flops_per_s, num_processes
        self._started = self._waited = 0.0

    def start(self) -> None:
        """A step begins."""
        self._started, self._waited = time.perf_counter(), 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The time within is spent on getting the step's samples."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - began

    def finish(self, tokens: int, supervised_tokens: int) -> dict[str, float]:
        """Figures of the step that ends now, which had so many tokens on all processes together.

        The caller has read a result of the step, so that the device is done with it.
        """
        seconds = time.perf_counter() - self._started
        flops = self._per_token * tokens + self._per_target * supervised_tokens
        figures = {
            "tokens_per_s": tokens / seconds,
            "supervised_tokens_per_s": supervised_tokens / seconds,
            "data_wait_share": self._waited / seconds,
        }
        if self._rate is not None:
            figures["mfu"] = flops / seconds / (self._rate * self._num_processes)
        return figures


def step_flops(model: nn.Module) -> tuple[float, float]:
    """Useful operations of a training step per token, and per supervised token on top."""
    inner = inner_model(model)
    head = set(_modules(inner.get_output_embeddings()))
    shares = _expert_shares(inner)
    per_token = per_target = 0.0
    for module in inner.modules():
        flops = shares.get(module, 1.0) * _module_flops(module)
        if module in head:
            per_target += flops
        else:
            per_token += flops
    return per_token, per_target


def _module_flops(module: nn.Module) -> float:
    """Per token that goes through the module itself, not through those below it."""
    if isinstance(module, nn.Linear):
        num_weights = module.in_features * module.out_features
        return num_weights * (6 if module.weight.requires_grad else 4)
    if isinstance(module, TrainedScales):
        return 2.0 * module.shape[0] * module.shape[1]
    # experts that are left dense
    stacks = [p for p in module.parameters(recurse=False) if p.ndim == 3]
    return float(sum(p.numel() * (6 if p.requires_grad else 4) for p in stacks))


def _expert_shares(inner: Any) -> dict[nn.Module, float]:
    """The share of the tokens that goes through modules of experts, where it is not all."""
    chosen = getattr(inner.config.get_text_config(), "num_experts_per_tok", 0)
    shares: dict[nn.Module, float] = {}
    for experts in inner.modules():
        number = getattr(experts, "num_experts", None)
        if number is None:
            continue
        if any(p.ndim == 3 and len(p) == number for p in experts.parameters(recurse=False)):
            shares[experts] = chosen / number
        for child in experts.children():
            if isinstance(child, (nn.ModuleDict, nn.ModuleList)) and len(child) == number:
                shares |= dict.fromkeys(child.modules(), chosen / number)
    return shares


def _modules(module: nn.Module | None) -> Iterator[nn.Module]:
    return iter(()) if module is None else module.modules()
