"""What an optimizer keeps, as plain tensors: any of ours, whole or sharded, before its first step.

`load_state_dict` would cast moments to the dtype of the parameter (bitsandbytes keeps bytes), wants
sharded state, and numbers parameters by position. Here every tensor goes by `parameter::key`, whole
and on the CPU, and comes back sharded as its parameter is, so that any number of processes can go
on from it. A number, such as bitsandbytes' step, is an int64 tensor without dimensions.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qtune.errors import UserError
from qtune.train.parallel import put, whole
from qtune.train.tensors import trained_parameters

# beside paths of state, which have a ::
KIND = "optimizer"


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of all that the optimizer keeps, on the CPU; a work of all processes together."""
    state = {
        f"{name}::{key}": _tensor(value)
        for name, parameter in trained_parameters(model).items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    return {KIND: _kind(optimizer), **state}


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Let the optimizer go on from what `optimizer_tensors` gave, bit for bit.

    Raises UserError for the state of another optimizer.
    """
    if not torch.equal(tensors[KIND], _kind(optimizer)):
        raise UserError(
            f"the checkpoint was written with {bytes(tensors[KIND].tolist()).decode()}, whose "
            f"state {type(optimizer).__name__} cannot use; put train.optimizer back, or start a "
            f"new run"
        )
    parameters = trained_parameters(model)
    for parameter in parameters.values():
        optimizer.state[parameter] = {}
    for path, full in tensors.items():
        name, found, key = path.partition("::")
        if found:
            parameter = parameters[name]
            optimizer.state[parameter][key] = _value(optimizer, parameter, full)


def _kind(optimizer: torch.optim.Optimizer) -> Tensor:
    """The optimizer's name as uint8 [n]."""
    return torch.tensor(list(type(optimizer).__name__.encode()), dtype=torch.uint8)


def _tensor(value: Tensor | int) -> Tensor:
    # bitsandbytes shares its code book among parameters, which safetensors refuses
    return whole(value).clone() if isinstance(value, Tensor) else torch.tensor(value)


def _value(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, full: Tensor) -> Tensor | int:
    if full.ndim == 0 and full.dtype == torch.int64:
        return int(full)
    if full.shape != parameter.shape:
        return full.to(parameter.device, copy=True)
    moment = _room(optimizer, parameter, full.dtype)
    put(moment, full)
    return moment


def _room(optimizer: Any, parameter: nn.Parameter, dtype: torch.dtype) -> Tensor:
    """A moment to be filled, where the optimizer would have put it."""
    if getattr(optimizer, "is_paged", False):
        moment: Tensor = optimizer.get_state_buffer(parameter, dtype=dtype)
        return moment
    return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
