"""A quantized model for other libraries: `qtune.load` returns what TRL, PEFT or a plain PyTorch
loop can train.

A recipe does more (data, plan, measurement, export); this is the way to algorithms that qtune does
not have. What comes back are ordinary objects of transformers and PEFT, so their own ways to train,
save and generate apply. Heavy packages are imported when `load` is called: `import qtune` stays
fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast, get_args

from qtune.errors import UserError
from qtune.recipe import FormatName, Lora, Quant

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load(
    model: str,
    *,
    quant: str | Quant | None = "nf4",
    lora: Lora | None = None,
    dtype: torch.dtype | str = "bfloat16",
    device: torch.device | str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """The frozen, quantized base model and its tokenizer; with `lora` a PeftModel to be trained.

    `model` is whatever a recipe's `model` may be: hub id, folder, .gguf file. `quant` is a number
    format or a Quant, None leaves the weights as they are stored; `dtype` is that of all that is
    not quantized and of the computation. Without `device` it is the GPU of this process, else the
    CPU. The adapter is trained in float32; without `lora` there is none, as for trainers that take
    a `peft_config` or `PeftModel.from_pretrained`. Raises UserError where the model cannot be had,
    does not suit `quant`, or has no layer that `lora` names.
    """
    import torch
    from accelerate import PartialState

    from qtune.model.load import add_adapter, load_base, load_tokenizer
    from qtune.model.sources import resolve

    form = _quant(quant)
    computed_in = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(computed_in, torch.dtype) or not computed_in.is_floating_point:
        raise UserError(f"dtype={dtype!r}: take bfloat16, float16 or float32")
    if lora is not None and lora.init != "zero":
        raise UserError(
            f"lora.init: {lora.init} measures the model on text; a recipe's run does, for load() "
            "take lora.init: zero"
        )
    state = PartialState()
    with state.main_process_first():
        folder = resolve(model, revision=revision)
    base = load_base(
        folder,
        form,
        device=state.device if device is None else torch.device(device),
        dtype=computed_in,
        trust_remote_code=trust_remote_code,
    )
    # what PEFT writes into an adapter's configuration, to be found by whoever loads it
    base.name_or_path = model
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    return (base if lora is None else add_adapter(base, lora)), tokenizer


def _quant(given: str | Quant | None) -> Quant | None:
    """What `quant` stands for; UserError for a number format that there is not."""
    if given is None or isinstance(given, Quant):
        return given
    formats = get_args(FormatName)
    if given not in formats:
        raise UserError(f"quant={given!r}: there is no such number format; take one of {formats}")
    return Quant(format=cast(FormatName, given))
