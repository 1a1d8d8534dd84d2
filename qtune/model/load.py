"""Recipe -> model ready to train: the base in its number format, the adapter on top."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from qtune.errors import UserError
from qtune.model import attention, lora, quantizer
from qtune.quant.linear import QuantLinear
from qtune.recipe import Lora, Quant


def register() -> None:
    """Make transformers and PEFT know qtune's quantizer, attention and adapter layer."""
    quantizer.register()
    attention.register()
    lora.register()


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, with a padding token for generation in batches."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(
    folder: Path,
    quant: Quant | None,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The frozen base model on `device`; `quant` None loads it as it is stored.

    Layers become QuantLinear while their shard is read; a folder that is already quantized loads as it is.
    """
    register()
    logging.disable_progress_bar()
    options: dict[str, Any] = {}
    if quant is not None and quant.format is not None:
        options["quantization_config"] = quantizer.QtuneConfig(
            format=quant.format, group_size=quant.group_size, skip=list(quant.skip)
        )
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        device_map={"": device},
        attn_implementation=attention.NAME,
        trust_remote_code=trust_remote_code,
        **options,
    )
    model.requires_grad_(False)
    model.config.use_cache = False
    return model


def add_adapter(model: PreTrainedModel, settings: Lora) -> PeftModel:
    """The model with a fresh, trainable float32 adapter; raises UserError where no layer matches."""
    check_targets(model, settings)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        target_modules=_plain(settings.target_modules),
        modules_to_save=list(settings.modules_to_save) or None,
        rank_pattern=settings.rank_pattern,
        alpha_pattern=settings.alpha_pattern,
    )
    return get_peft_model(model, config)  # type: ignore[no-any-return]


def check_targets(model: nn.Module, settings: Lora) -> None:
    """Raises UserError for a target that matches no layer and for full training of a quantized one."""
    linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    known = sorted({name.rsplit(".", 1)[-1] for name in linears})
    wanted = settings.target_modules
    if wanted != "all-linear":
        for target in (wanted,) if isinstance(wanted, str) else wanted:
            if not any(name == target or name.endswith("." + target) for name in linears):
                raise UserError(
                    f"lora.target_modules: '{target}' matches no layer; there are: {', '.join(known)}"
                )
    for target in settings.modules_to_save:
        for name, layer in linears.items():
            if name.endswith(target) and isinstance(layer, QuantLinear):
                raise UserError(
                    f"lora.modules_to_save: '{target}' is quantized and cannot be trained in full; "
                    f"add it to quant.skip"
                )


def _plain(targets: str | tuple[str, ...]) -> str | list[str]:
    if targets == "all-linear":
        return targets
    return [targets] if isinstance(targets, str) else list(targets)
