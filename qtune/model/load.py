"""Recipe -> model ready to train: the base in its number format, the adapter on top."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from qtune.errors import UserError
from qtune.model import attention, lora, quantizer
from qtune.model.folder import read_json
from qtune.model.fused import fuse
from qtune.model.quant_config import QtuneConfig
from qtune.model.targets import adapter_targets
from qtune.recipe import Lora, Quant

# what a folder that is quantized already has to have in common with the recipe
MUST_AGREE = ("quant_method", "format", "group_size", "rotate", "channels", "layers")


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

    Layers become QuantLinear while their shard is read; a folder of such layers loads as it is.
    Raises UserError where the folder is quantized otherwise than `quant` says, or lacks weights.
    """
    model = load_complete(
        folder,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        device=device,
        **_quantization(folder, quant),
    )
    make_ready(model)
    model.requires_grad_(False)
    model.config.use_cache = False
    return model


def load_complete(
    folder: Path, *, device: torch.device, trust_remote_code: bool = False, **options: Any
) -> PreTrainedModel:
    """The model as transformers loads it with these options, if the folder has all its weights."""
    register()
    if device.type != "cpu":
        # on the CPU this would copy what can stay in the mapped files, shared by processes
        options["device_map"] = {"": device}
    logging.disable_progress_bar()
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=trust_remote_code, output_loading_info=True, **options
    )
    model: PreTrainedModel
    model, info = loaded
    _check_complete(folder, info)
    return model


def make_ready(model: PreTrainedModel) -> None:
    """Let the model run qtune's attention and fused ops wherever they compute the same."""
    attention.use_packed(model)
    fuse(model)


def add_adapter(model: PreTrainedModel, settings: Lora, **changes: Any) -> PeftModel:
    """The model with a fresh, trainable float32 adapter; UserError: settings match no layer.

    `changes` are what PEFT's configuration has otherwise than these settings say.
    """
    wanted = {
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rslora,
        "use_dora": settings.dora,
        "target_modules": adapter_targets(model, settings),
        "modules_to_save": list(settings.modules_to_save) or None,
        "rank_pattern": settings.rank_pattern,
        "alpha_pattern": settings.alpha_pattern,
    }
    config = LoraConfig(task_type="CAUSAL_LM", **(wanted | changes))
    return get_peft_model(model, config)


def _check_complete(folder: Path, info: dict[str, Any]) -> None:
    """Raises UserError where weights are missing: transformers makes up random ones."""
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} of the model's tensors, as {missing[0]}; copy or "
            "download it again"
        )


def _quantization(folder: Path, quant: Quant | None) -> dict[str, QtuneConfig]:
    """What the loader is told to quantize to; nothing where the folder is what it should be."""
    if quant is None or quant.format is None:
        return {}
    wanted = QtuneConfig.of(quant)
    stored = read_json(folder / "config.json").get("quantization_config")
    if stored is None:
        check_needs_no_text(quant)
        # for an already quantized folder transformers would ignore it
        return {"quantization_config": wanted}
    plain = QtuneConfig()
    for key in MUST_AGREE:
        found, asked = stored.get(key, getattr(plain, key)), getattr(wanted, key)
        if found != asked:
            raise UserError(
                f"{folder} is already quantized, with {key} {found} and not {asked}; name the "
                "16-bit model, or set quant.format: null to take the folder as it is"
            )
    return {}


def check_needs_no_text(quant: Quant) -> None:
    """Raises UserError where codes are to be found with text, which loading has none of."""
    if quant.method != "nearest":
        raise UserError(
            f"quant.method: {quant.method} measures the model on text while it quantizes; a "
            "recipe's run does (`qtune train`), loading alone can do quant.method: nearest"
        )
