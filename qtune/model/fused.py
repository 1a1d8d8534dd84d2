"""Puts the fused ops of qtune_kernels into the modules of one loaded model.

A module that is taken gets a subclass of its own class, for that instance alone: names, state dict,
hooks, what PEFT wraps and what `isinstance` says stay as they were, and nothing global changes.
Whether a module is taken is found out by running it, not by a list of models: a copy with small
random weights in the place of its own must give what the formula gives, so quantized modules and
those on `meta` are checked alike. What gives something else, or takes more arguments, stays as it
is. Rotations are in fused_rotation.py.

The sum before a norm stays outside of it: blocks add with an operator, which no module stands for.
"""

import copy
import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from qtune.model.fused_rotation import fuse_rotation
from qtune_kernels.norm import rms_norm
from qtune_kernels.rows import wanted_room
from qtune_kernels.swiglu import gated

EPS_NAMES = ("variance_epsilon", "eps")
OFFSETS = (0.0, 1.0)
ACTIVATION_NAMES = {"act_fn", "activation_fn"}
SPLIT, JOINED = {"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu_tanh": lambda x: gelu(x, approximate="tanh"),
}
# rows of random inputs, from so small that eps counts to so large that clamps do
ROWS, SMALLEST, LARGEST = 16, 1e-3, 1e3
# widths inside an MLP on trial
WIDTH, INNER = 8, 12
# most relative difference of a row that float32 rounding explains
ROUNDING = 1e-4


def fuse(model: nn.Module) -> list[str]:
    """Names of the modules that now run fused ops; those for which there is none are left alone."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        return [name for name, module in model.named_modules() if _fuse(module)]


class _FusedNorm(nn.Module):
    """A norm whose forward is one op."""

    weight: Tensor
    fused_eps: float
    fused_offset: float

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype != x.dtype:
            # which dtype the result has then is the original's business
            original: Tensor = super().forward(x)
            return original
        settings = self.fused_eps, self.fused_offset, wanted_room(x)
        y: Tensor = rms_norm(x, self.weight, *settings)
        return y


class _FusedMLP(nn.Module):
    """An MLP whose activation and product are one op."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    fused_activation: str

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        h = gated(gate, up, self.fused_activation, wanted_room(gate))
        y: Tensor = self.down_proj(h)
        return y


class _FusedJoinedMLP(nn.Module):
    """The same where one layer makes both gate and up."""

    gate_up_proj: nn.Module
    down_proj: nn.Module
    fused_activation: str

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        h = gated(gate, up, self.fused_activation, wanted_room(gate))
        y: Tensor = self.down_proj(h)
        return y


def _fuse(module: nn.Module) -> bool:
    """Whether the module was given a fused class."""
    fused = isinstance(module, (_FusedNorm, _FusedMLP, _FusedJoinedMLP))
    # in its `vars`: somebody else has replaced the forward of this instance
    if fused or "forward" in vars(module):
        return False
    return _fuse_norm(module) or _fuse_mlp(module) or fuse_rotation(module)


def _fuse_norm(module: nn.Module) -> bool:
    own = dict(module.named_parameters(recurse=False))
    eps = next((getattr(module, name) for name in EPS_NAMES if hasattr(module, name)), None)
    named = type(module).__name__.endswith("RMSNorm")
    if not named or own.keys() != {"weight"} or eps is None or not _is_plain(module, set()):
        return False
    offset = _norm_offset(module, len(own["weight"]), eps)
    if offset is None:
        return False
    _recast(module, _FusedNorm, fused_eps=eps, fused_offset=offset)
    return True


def _norm_offset(module: nn.Module, width: int, eps: float) -> float | None:
    """What the norm adds to its weight; None if it computes something else."""
    weight, x = torch.randn(width, device="cpu"), _inputs(width)
    y = _on_trial(module, {"weight": nn.Parameter(weight)}, {})(x)
    normal = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return next((offset for offset in OFFSETS if _same(y, normal * (weight + offset))), None)


def _fuse_mlp(module: nn.Module) -> bool:
    children = {name for name, _ in module.named_children()}
    parts = children - ACTIVATION_NAMES
    if parts not in (SPLIT, JOINED) or len(children) != len(parts) + 1:
        return False
    if list(module.parameters(recurse=False)) or not _is_plain(module, children):
        return False
    activation = _mlp_activation(module, joined=parts == JOINED)
    if activation is None:
        return False
    fused = _FusedJoinedMLP if parts == JOINED else _FusedMLP
    _recast(module, fused, fused_activation=activation)
    return True


def _mlp_activation(module: nn.Module, *, joined: bool) -> str | None:
    """Its activation's name among ours; None if the MLP computes something else."""
    gate, up, down = _linear(WIDTH, INNER), _linear(WIDTH, INNER), _linear(INNER, WIDTH)
    layers: dict[str, nn.Module] = {"gate_proj": gate, "up_proj": up, "down_proj": down}
    if joined:
        both = _linear(WIDTH, 2 * INNER)
        both.weight.copy_(torch.cat([gate.weight, up.weight]))
        layers = {"gate_up_proj": both, "down_proj": down}
    x = _inputs(WIDTH)
    y = _on_trial(module, {}, layers)(x)
    results = {name: down(act(gate(x)) * up(x)) for name, act in ACTIVATIONS.items()}
    return next((name for name, result in results.items() if _same(y, result)), None)


def _recast(module: nn.Module, fused: Any, **settings: float | str) -> None:
    """Give the module the forward of `fused`, and what that reads from its class."""
    original: Any = type(module)
    module.__class__ = _subclass(fused, original, **settings)


@cache
def _subclass(fused: Any, original: Any, **settings: float | str) -> type[nn.Module]:
    # one for all modules alike, which torch.compile can then compile once
    return type(f"Fused{original.__name__}", (fused, original), settings)


def _is_plain(module: nn.Module, children: set[str]) -> bool:
    """Whether forward takes x alone, and the module has those children and no buffers."""
    found = {name for name, _ in module.named_children()}
    arguments = inspect.signature(type(module).forward).parameters
    return found == children and len(arguments) == 2 and not list(module.buffers(recurse=False))


def _on_trial(
    module: nn.Module, parameters: Mapping[str, nn.Parameter], layers: Mapping[str, nn.Module]
) -> nn.Module:
    """A copy with other parameters and layers, as in training, where dropout would show."""
    trial = copy.copy(module)
    trial._parameters = {**module._parameters, **parameters}
    trial._modules = {**module._modules, **layers}
    trial.training = True
    return trial


def _linear(in_features: int, out_features: int) -> nn.Linear:
    return nn.Linear(in_features, out_features, bias=False, device="cpu", dtype=torch.float32)


def _inputs(width: int) -> Tensor:
    """Random rows, float32 [ROWS, width], each larger than the one before."""
    rows = torch.randn(ROWS, width, device="cpu", dtype=torch.float32)
    ratio = (LARGEST / SMALLEST) ** (1 / (ROWS - 1))
    sizes = [SMALLEST * ratio**row for row in range(ROWS)]
    return rows * torch.tensor(sizes, device="cpu", dtype=torch.float32).unsqueeze(1)


def _same(y: Tensor, other: Tensor) -> bool:
    """Whether all rows agree to rounding."""
    difference = torch.linalg.vector_norm(y - other, dim=-1)
    return bool((difference <= ROUNDING * torch.linalg.vector_norm(other, dim=-1)).all())
