"""What the inputs of each matrix are worth: the mean of their squares over calibration text.

An error in a weight moves the output by as much as its input is large, so encoders of few bits care
more for weights whose inputs are. It is what llama.cpp calls an importance matrix, measured on the
model that was trained. Sums only, not whole second moments: all layers are measured in one pass.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from qtune.data.calibration import Text
from qtune.model.checkpoint import bare_name

# tokens are what counts, and more say little new
MAX_TOKENS = 16384


class _Squares:
    """The mean of squared inputs, float32 [I]."""

    def __init__(self) -> None:
        self.sum: Tensor | None = None
        self.num_tokens = 0

    def add(self, x: Tensor) -> None:
        """Count the tokens of x [..., I]."""
        tokens = x.detach().flatten(0, -2).float()
        squares = tokens.square().sum(0)
        self.sum = squares if self.sum is None else self.sum + squares
        self.num_tokens += len(tokens)


@torch.no_grad()
def importance(model: nn.Module, text: Text) -> dict[str, Tensor]:
    """Mean square [I], float32 on the CPU, of the inputs of each linear layer, by the name of its
    weight in the base model. Layers that get none are left out.
    """
    was, tokens = model.training, 0
    device = next(model.parameters()).device
    model.eval()
    with _measured(model) as found:
        for row in text.rows:
            if tokens >= MAX_TOKENS:
                break
            model(input_ids=torch.tensor([row], device=device), use_cache=False)
            tokens += len(row)
    model.train(was)
    return {
        f"{name}.weight": (squares.sum / squares.num_tokens).cpu()
        for name, squares in found.items()
        if squares.sum is not None
    }


@contextmanager
def _measured(model: nn.Module) -> Iterator[dict[str, _Squares]]:
    """The squares of what linear layers are given meanwhile, by their names in the base model."""
    found: dict[str, _Squares] = {}
    with ExitStack() as stack:
        for path, layer in model.named_modules():
            inside = ".lora_" in path or ".base_layer" in path
            if inside or not isinstance(layer, (nn.Linear, LoraLayer)):
                continue
            name = bare_name(path).removeprefix("base_model.model.")
            squares = found[name] = _Squares()
            assert isinstance(layer, nn.Module)
            stack.callback(layer.register_forward_pre_hook(_hook(squares)).remove)
        yield found


def _hook(squares: _Squares) -> Callable[..., None]:
    return lambda layer, args: squares.add(args[0])
