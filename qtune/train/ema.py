"""A moving average of the adapter, which is evaluated and kept instead of its last state.

The average is over the states after each step alone: the start, where B is zero, has no part in
it. With decay d, state i of t counts d^(t-i) (1-d) / (1-d^t), as Adam corrects its moments. So it
is of use in short runs too. It is float32 whatever the adapter is, or small steps would be lost.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qtune.train.parallel import put

# beside names of parameters, which have a dot
COUNT = "num_updates"


class Average:
    """The average of these parameters, sharded as they are."""

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        self._parameters, self._decay = parameters, decay
        self._means = {name: p.detach().float().clone() for name, p in parameters.items()}
        self._num_updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are now, after an optimizer step."""
        self._num_updates += 1
        share = (1 - self._decay) / (1 - self._decay**self._num_updates)
        for name, parameter in self._parameters.items():
            self._means[name].lerp_(parameter.float(), share)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Meanwhile the model holds the average; afterwards every bit is as it was."""
        held = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._copy_to_model(self._means)
        try:
            yield
        finally:
            self._copy_to_model(held)

    @torch.no_grad()
    def _copy_to_model(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])

    def tensors(self) -> dict[str, Tensor]:
        """The average by parameter, float32, and how often it was updated, int64 []."""
        return {**self._means, COUNT: torch.tensor(self._num_updates)}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` gave, whole tensors of the same parameters."""
        for name, mean in self._means.items():
            put(mean, tensors[name])
        self._num_updates = int(tensors[COUNT])
