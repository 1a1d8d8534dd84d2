"""`codes.safetensors`: the codes of a merge-aware run, beside the adapter as PEFT writes it.

They could be found again from base and adapter, but not everywhere the same: how a processor sums
up B A decides where a weight lies that is next to a boundary. So the very codes that were measured
are kept, `LAYER.codes`, packed as the layer's own.
"""

from collections.abc import Mapping
from pathlib import Path

from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from qtune.errors import UserError
from qtune.model.checkpoint import tensors_beside
from qtune.model.lora import QuantLoraLinear
from qtune.model.merge_aware import with_codes
from qtune.quant.linear import QuantLinear

FILE = "codes.safetensors"
# what PEFT puts before the names of the base model
PREFIX = "base_model.model."


def write(model: nn.Module, folder: Path) -> None:
    """Write the codes that a PeftModel multiplies with; no file where none is trained."""
    found = {
        f"{path.removeprefix(PREFIX)}.codes": layer.served.codes.detach().cpu()
        for path, layer in model.named_modules()
        if isinstance(layer, QuantLoraLinear) and layer.served is not None
    }
    if found:
        save_file(found, folder / FILE, metadata={"format": "pt"})


def read(folder: Path) -> dict[str, Tensor]:
    """The tensors of the file; none where there is no file. Raises UserError for a damaged one."""
    return tensors_beside(folder / FILE)


def put(model: PeftModel, saved: Mapping[str, Tensor]) -> dict[str, QuantLinear]:
    """Let layers have the saved codes, in which their adapter is, and say which.

    `disable_adapter` brings the base's codes back. Raises UserError for codes that no layer has, or
    another number of.
    """
    layers = dict(model.get_base_model().named_modules())
    tuned = {}
    for key, codes in saved.items():
        name = key.removesuffix(".codes")
        layer = _checked(name, layers.get(name), codes)
        base = layer.quantized
        tuned[name] = with_codes(base, codes.to(base.weight.device))
        for adapter in list(layer.active_adapters):
            layer.delete_adapter(adapter)
        layer.settle(tuned[name])
    if tuned:
        # written again, it is the adapter of what was trained beside the codes
        model.active_peft_config.r = 0
    return tuned


def _checked(name: str, layer: nn.Module | None, codes: Tensor) -> QuantLoraLinear:
    if not isinstance(layer, QuantLoraLinear):
        raise UserError(
            f"{FILE} has codes of {name}, which is no quantized layer of this base; name the "
            "model, and the quant section, that they were trained with"
        )
    expected = layer.quantized.weight.numel()
    if codes.numel() != expected:
        raise UserError(
            f"{FILE} has {codes.numel()} bytes of codes of {name}, which has {expected} here; put "
            "quant.format back to what they were trained with"
        )
    return layer
