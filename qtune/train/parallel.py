"""Several processes that train one model: how gradients, norms and tensors of all become one.

`ddp` keeps a whole model in every process. Only trained parameters are synchronized: the frozen
base is the same file everywhere, and copying it would take its pages out of the shared cache.
`fsdp` shards the quantized base (`model/sharded.py`) by PyTorch's own `fully_shard`; accelerate's
FSDP is refused, because on a CPU it silently becomes DDP. Both average gradients over processes.

Under fsdp a forward pass is work of all processes together, so each has to make the same number of
passes, and `settle` has to come between passes that no backward pass follows and whatever looks at
parameters.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from qtune.errors import UserError
from qtune.model.sharded import shard

# launchers of accelerate that would take the model out of our hands, by their variable
REFUSED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "its parallelism config",
}
# by what launchers tell a process its number
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
# the first process may have a large model or data set to prepare while the others wait
PATIENCE = timedelta(hours=6)


def open_accelerator(**options: Any) -> Accelerator:
    """The accelerator of this process; processes on a machine without a GPU find each other too.

    Raises UserError where accelerate was told to shard the model in its own way, or to start
    several processes in a way in which it starts one.
    """
    for variable, name in REFUSED.items():
        if _is_on(variable):
            raise UserError(
                f"accelerate is set up for {name}, which does not know quantized weights; take it "
                f"out of its configuration and write train.parallel: fsdp in the recipe"
            )
    if _is_on("ACCELERATE_USE_CPU") and "MASTER_ADDR" in os.environ and not _has_rank():
        raise UserError(
            "accelerate launch --cpu was asked for several processes and has started this one "
            "alone (it leaves the others to mpirun); on one machine use qtune train --nproc N, "
            "on several accelerate launch --multi_gpu, which works without GPUs too"
        )
    # accelerate takes processes on a CPU for single ones unless it is told
    if "LOCAL_RANK" in os.environ and not torch.accelerator.is_available():
        options["cpu"] = True
    return Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)], **options)


def distribute(
    model: PeftModel, accelerator: Accelerator, how: Literal["ddp", "fsdp"]
) -> nn.Module:
    """The model to call in training; a single process gets it back as it is.

    To be called before the optimizer is made: fsdp puts other parameters into the model.
    """
    if accelerator.num_processes == 1:
        return model
    if how == "fsdp":
        shard(model, accelerator.device)
        settle(model)
        return model
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    buffers = [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen + buffers)
    device = None if accelerator.device.type == "cpu" else [accelerator.device]
    return DistributedDataParallel(model, device_ids=device, gradient_as_bucket_view=True)


def without_sync(model: nn.Module, accelerator: Accelerator) -> AbstractContextManager[None]:
    """Meanwhile gradients stay in their process; those of the first pass outside bring them all."""
    if isinstance(model, DistributedDataParallel):
        return cast(AbstractContextManager[None], model.no_sync())
    root = _root(model)
    return nullcontext() if root is None else _keeping_gradients(root)


def clip_grad_norm(parameters: Iterable[nn.Parameter], limit: float) -> float:
    """Norm of all gradients, also of sharded ones, which are then scaled down to `limit`."""
    trained = [p for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    nn.utils.clip_grads_with_norm_(trained, limit, norm)
    return float(norm)


def settle(model: nn.Module) -> None:
    """Make sharded parameters be what they are between steps, after passes without a backward."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """The full tensor on the CPU; for a sharded one all processes have to ask together."""
    tensor = tensor.detach()
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.cpu()


def put(tensor: Tensor, full: Tensor) -> None:
    """Copy a full tensor, which every process has, into a maybe sharded one."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        full = full.to(tensor.device, tensor.dtype)
        part = distribute_tensor(full, tensor.device_mesh, tensor.placements, src_data_rank=None)
        tensor.to_local().copy_(part.to_local())
    else:
        tensor.copy_(full)


def total(tensor: Tensor, accelerator: Accelerator) -> Tensor:
    """The sum of the processes' tensors, in every process."""
    return cast(Tensor, accelerator.reduce(tensor, "sum"))


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")


def _has_rank() -> bool:
    return any(name in os.environ for name in RANKS)


def _root(model: nn.Module) -> FSDPModule | None:
    return next((module for module in model.modules() if isinstance(module, FSDPModule)), None)


@contextmanager
def _keeping_gradients(root: FSDPModule) -> Iterator[None]:
    root.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        root.set_requires_gradient_sync(True)
