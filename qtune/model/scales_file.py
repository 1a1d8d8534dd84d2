"""`scales.safetensors`: the trained scales of a run, beside the adapter as PEFT writes it.

Float16, as the model that was measured has them: `LAYER.scales` and, where they were trained,
`LAYER.zeros`, both [S].
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qtune.errors import UserError
from qtune.model.checkpoint import bare_name, tensors_beside
from qtune.model.lora import QuantLoraLinear
from qtune.model.scales import NAME, with_scales
from qtune.quant.linear import QuantLinear
from qtune_kernels.scales import Scales

FILE = "scales.safetensors"
# what PEFT puts before the names of the base model
PREFIX = "base_model.model."


def write(model: nn.Module, folder: Path, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Write the scales that are trained in a PeftModel; no file where there are none.

    `tensors` are the trained parameters by name, where the model holds only a part of each.
    """
    values = tensors if tensors is not None else dict(model.named_parameters())
    found: dict[str, Tensor] = {}
    for path, layer in model.named_modules():
        if not isinstance(layer, QuantLoraLinear) or layer.trained_scales is None:
            continue
        own = f"{path}.{NAME}."
        shifts = values.get(f"{own}shifts")
        stored = layer.trained_scales.stored(values[f"{own}scales"].detach(), shifts, None)
        name = path.removeprefix(PREFIX)
        found[f"{name}.scales"] = stored.codes.cpu()
        if stored.zeros is not None:
            found[f"{name}.zeros"] = stored.zeros.detach().cpu()
    if found:
        save_file(found, folder / FILE, metadata={"format": "pt"})


def read(folder: Path) -> dict[str, Tensor]:
    """The tensors of the file; none where there is no file. Raises UserError for a damaged one."""
    return tensors_beside(folder / FILE)


def put(model: nn.Module, saved: Mapping[str, Tensor]) -> dict[str, QuantLinear]:
    """Let layers have the saved scales, and say which; `disable_adapter` brings the base's back.

    Raises UserError for scales that no layer has, or another number of.
    """
    layers = {
        bare_name(path.removeprefix(PREFIX)): layer
        for path, layer in model.named_modules()
        if isinstance(layer, QuantLoraLinear)
    }
    tuned = {}
    for key in (key for key in saved if key.endswith(".scales")):
        name = key.removesuffix(".scales")
        _check(name, layers, saved[key])
        base = layers[name].quantized
        zeros = saved.get(f"{name}.zeros", base.quant_weight.scales.zeros)
        device, none = base.weight.device, torch.empty(0, device=base.weight.device)
        scales = Scales(
            saved[key].to(device), none, none, None if zeros is None else zeros.to(device)
        )
        tuned[name] = with_scales(base, scales)
        layers[name].settle(tuned[name])
    return tuned


def _check(name: str, layers: Mapping[str, QuantLoraLinear], scales: Tensor) -> None:
    if name not in layers:
        raise UserError(
            f"{FILE} has scales of {name}, which is no quantized layer of this base; name the "
            "model, and the quant section, that they were trained with"
        )
    base = layers[name].quantized
    expected = -(-base.in_features * base.out_features // base.group_size)
    if scales.numel() != expected:
        raise UserError(
            f"{FILE} has {scales.numel()} scales of {name}, which has {expected} groups here; put "
            "quant.group_size back to what they were trained with"
        )
