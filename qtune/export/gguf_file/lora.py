"""A LoRA adapter as a GGUF file of its own, which llama.cpp puts onto a base when it is loaded.

llama.cpp scales every update by alpha over its rank, with one alpha for the file. rsLoRA, and other
alphas or ranks for single layers, are therefore put into B; alpha becomes the largest rank.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor

from qtune.errors import UserError
from qtune.export.gguf_file.families import TensorNames
from qtune.export.gguf_file.write import add_tensor, opened
from qtune.model.merge import NO_START
from qtune.model.start import PREFIX, SUFFIXES, Start, difference

_A, _B = SUFFIXES
# which tensors a file of them says it holds
_FILE_TYPE = 0


def write_lora(path: Path, model: PeftModel, config: Any, start: Start = NO_START) -> None:
    """Write the active adapter, without what it began with, in float32.

    Raises UserError for an adapter of which LoRA's two matrices are not all.
    """
    names = TensorNames(config)
    pairs = list(_pairs(model, start))
    alpha = max(len(a) for _, a, _ in pairs)
    with opened(path, names.family.architecture) as writer:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", float(alpha))
        writer.add_file_type(_FILE_TYPE)
        for parameter, a, b in pairs:
            name = names.name(parameter)
            scaled = names.value(parameter, b * (len(a) / alpha))
            add_tensor(writer, f"{name}.lora_a", a, "F32")
            add_tensor(writer, f"{name}.lora_b", scaled, "F32")


def _pairs(model: PeftModel, start: Start) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name of the weight, A [R, I] and B [O, R], whose product is the whole update of it."""
    (adapter,) = model.active_adapters
    layers = dict(model.get_base_model().named_modules())
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    _check_plain(state)
    if start:
        state, _ = difference(model, state, start)
    for key, tensor in state.items():
        if not key.endswith(_A):
            continue
        name = key.removeprefix(PREFIX).removesuffix(_A)
        layer = layers[name]
        assert isinstance(layer, LoraLayer)
        a, b = (part.detach().float().cpu() for part in (tensor, state[key.replace(_A, _B)]))
        yield f"{name}.weight", a, b * layer.scaling[adapter]


def _check_plain(state: dict[str, Tensor]) -> None:
    others = [key for key in state if not key.endswith(SUFFIXES)]
    if others:
        raise UserError(
            f"a LoRA file of llama.cpp holds A and B of linear layers, and this adapter has "
            f"{others[0].removeprefix(PREFIX)} too; export a merged gguf"
        )
    if not state:
        raise UserError("there is no adapter to write; export gguf-q8_0 or another gguf")
