"""What a checkpoint holds of adapter and random numbers: whole tensors by name.

Sharded tensors are put together on the CPU and cut up again when they come back, so any number of
processes can go on from them. All processes have to call these functions together.
"""

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from qtune.train import parallel


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def whole_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the trained parameters on the CPU; later steps do not change them."""
    trained = trained_parameters(model).items()
    return {name: parallel.whole(parameter).clone() for name, parameter in trained}


def put_parameters(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Make the trained parameters what `whole_parameters` gave; KeyError where one is missing."""
    with torch.no_grad():
        for name, parameter in trained_parameters(model).items():
            parallel.put(parameter, values[name])


def random_numbers(accelerator: Accelerator) -> dict[str, Tensor]:
    """State of every process's random number generators as `rank_0` and so on, uint8."""
    states = [torch.get_rng_state()]
    if accelerator.device.type == "cuda":
        states.append(torch.cuda.get_rng_state(accelerator.device))
    own = torch.cat(states).to(accelerator.device)
    return {f"rank_{i}": state.cpu() for i, state in enumerate(accelerator.gather(own[None]))}


def put_random_numbers(saved: Mapping[str, Tensor], accelerator: Accelerator, seed: int) -> None:
    """Set this process's generators to where they were; anew by `seed` for others than saved."""
    state = saved[f"rank_{accelerator.process_index}"] if _fits(saved, accelerator) else None
    if state is None:
        torch.manual_seed(seed + accelerator.process_index)
        return
    size = len(torch.get_rng_state())
    # PyTorch reads from where the storage begins, not where a slice does
    torch.set_rng_state(state[:size].clone())
    if accelerator.device.type == "cuda":
        torch.cuda.set_rng_state(state[size:].clone(), accelerator.device)


def _fits(saved: Mapping[str, Tensor], accelerator: Accelerator) -> bool:
    """Whether as many processes on as many generators wrote it."""
    on_gpu = len(saved["rank_0"]) > len(torch.get_rng_state())
    same_device: bool = on_gpu == (accelerator.device.type == "cuda")
    return same_device and len(saved) == accelerator.num_processes
