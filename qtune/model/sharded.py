"""A model whose parameters are spread over processes, each of which holds its slice only.

`fully_shard` of PyTorch (FSDP2), block by block: a block's parameters are gathered while it runs,
quantized ones as the bytes that they are. What is frozen never is in memory whole: it is read from
a quantized folder, of which each process copies its slice of every tensor.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from qtune.model import start
from qtune.model.adapt import adapt
from qtune.model.blocks import blocks
from qtune.model.checkpoint import bare_name, weight_files
from qtune.model.folder import read_json
from qtune.model.forward import inner_model
from qtune.model.load import load_base
from qtune.model.prequantized import quantized_folder
from qtune.recipe import Recipe

# as safetensors calls them
DTYPES = {
    "U8": torch.uint8,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
}


def load_adapted(folder: Path, recipe: Recipe, accelerator: Accelerator) -> PeftModel:
    """The recipe's base with an adapter at its start, which is the same in every process.

    `folder` is the model's own, or a calibrated one, which may hold the start. Several processes of
    a machine share the base's quantized form, which one of them makes; under fsdp each then holds
    its slices. Raises UserError as `load_base` and `adapt` do.
    """
    several, device = accelerator.num_processes > 1, accelerator.device
    if several and recipe.train.parallel == "fsdp":
        return load_sharded(folder, recipe, accelerator)
    stored = _quantized(folder, recipe, device) if several else folder
    return _adapted(stored, recipe, device)


def load_sharded(folder: Path, recipe: Recipe, accelerator: Accelerator) -> PeftModel:
    """The recipe's base with an adapter at its start, spread over all processes.

    Its numbers are those of an unsharded one.
    """
    device = accelerator.device
    stored = _quantized(folder, recipe, device)
    # mapped from the files: nothing is read before it is looked at
    model = _adapted(stored, recipe, torch.device("cpu"))
    _let_go(model, stored)
    shard(model, device)
    _fill(model, stored, device)
    return model


def _quantized(folder: Path, recipe: Recipe, device: torch.device) -> Path:
    trusted = recipe.trust_remote_code
    return quantized_folder(folder, recipe.quant, device=device, trust_remote_code=trusted)


def _adapted(folder: Path, recipe: Recipe, device: torch.device) -> PeftModel:
    trusted = recipe.trust_remote_code
    base = load_base(folder, recipe.quant, device=device, trust_remote_code=trusted)
    torch.manual_seed(recipe.seed)
    model = adapt(base, recipe)
    if (folder / start.FILE).exists():
        start.put(model, folder / start.FILE)
    return model


def shard(model: PeftModel, device: torch.device) -> None:
    """Spread the parameters over all processes, block by block; nothing where that is done.

    The root group (embeddings, last norm, head) stays together after a forward pass, so that a loss
    can be computed from hidden states.
    """
    inner: nn.Module = inner_model(model)
    if isinstance(inner, FSDPModule):
        return
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for block in blocks(inner):
        fully_shard(block, mesh=mesh)
    fully_shard(inner, mesh=mesh, reshard_after_forward=False)


def _let_go(model: PeftModel, folder: Path) -> None:
    """Put empty tensors on `meta` in the place of frozen ones that can be read from the folder."""
    stored, places = _stored(folder), list(_places(model))
    readable = {
        parameter
        for name, _, _, parameter in places
        if not parameter.requires_grad and stored.get(name) == (parameter.shape, parameter.dtype)
    }
    empty = {p: _frozen(torch.empty_like(p, device="meta")) for p in readable}
    # tied parameters have one name in the folder and stay one
    for _, module, leaf, parameter in places:
        if parameter in readable:
            setattr(module, leaf, empty[parameter])


def _fill(model: PeftModel, folder: Path, device: torch.device) -> None:
    """Put this process's slices from the folder into what is on `meta`."""
    places = [place for place in _places(model) if place[-1].is_meta]
    wanted = {name: parameter for name, _, _, parameter in places}
    filled: dict[nn.Parameter, nn.Parameter] = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in wanted.keys() & set(file.keys()):
                parameter = wanted[name]
                # what is read is a view of the mapped file, which is not to stay open
                rows = file.get_slice(name)[_own_rows(parameter)].to(device, copy=True)
                filled[parameter] = _sharded(parameter, rows)
    for _, module, leaf, parameter in places:
        setattr(module, leaf, filled[parameter])


def _own_rows(parameter: nn.Parameter) -> slice:
    """Which part of a parameter's first dimension this process holds; the last may hold less."""
    assert isinstance(parameter, DTensor) and parameter.placements == (Shard(0),)
    mesh, num_rows = parameter.device_mesh, parameter.shape[0]
    start = min(num_rows, mesh.get_local_rank() * -(-num_rows // mesh.size()))
    return slice(start, start + parameter.to_local().shape[0])


def _sharded(like: nn.Parameter, rows: Tensor) -> nn.Parameter:
    """A frozen parameter sharded as that on `meta`, of which this process holds these rows."""
    assert isinstance(like, DTensor)
    return _frozen(
        DTensor.from_local(
            rows,
            like.device_mesh,
            like.placements,
            shape=like.shape,
            stride=like.stride(),
        )
    )


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _stored(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype | None]]:
    """Shape and dtype by the names of a model's own parameters, where the folder goes by these."""
    if "quantization_config" not in read_json(folder / "config.json"):
        # names and tensors may become others while loading
        return {}
    found = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (the file is no mapping)
                part = file.get_slice(name)
                found[name] = torch.Size(part.get_shape()), DTYPES.get(part.get_dtype())
    return found


def _places(model: PeftModel) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Where the base's parameters are: name in the base, module, name there, and what is there."""
    for path, module in inner_model(model).named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            yield bare_name(f"{path}.{leaf}"), module, leaf, parameter
