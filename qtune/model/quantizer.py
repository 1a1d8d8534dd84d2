"""The transformers quantizer: packs each tensor as it comes out of its shard.

With it `AutoModelForCausalLM.from_pretrained(folder, quantization_config=QtuneConfig(...))` is the
loader for any architecture, and a folder saved from such a model loads again with `from_pretrained`
after `import qtune`. Peak memory is about the quantized size plus the largest tensor: a shard's
pages are given back once read. Output layers stay dense whatever `skip` says.
"""

import ctypes
import mmap
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from qtune.errors import UserError
from qtune.model.fused import fuse
from qtune.quant.format import load_format
from qtune.quant.linear import QuantLinear
from qtune.quant.weight import check_group_size

# advice to the kernel that never loses anything: what is not in a file stays where it is
MADV_PAGEOUT = 21
_libc = ctypes.CDLL(None)


class QtuneConfig(QuantizationConfigMixin):
    """`quantization_config` of a model whose linear layers are QuantLinear; kept in config.json.

    Raises UserError for an unknown format and for a group size that is no power of two.
    """

    def __init__(
        self,
        format: str = "nf4",
        group_size: int = 64,
        skip: list[str] | None = None,
        **unused: Any,
    ) -> None:
        self.quant_method = "qtune"  # type: ignore[assignment]
        self.format, self.group_size = format, group_size
        self.skip = list(skip) if skip is not None else ["lm_head"]
        load_format(format)
        check_group_size(group_size)


class Pack(ConversionOps):
    """A dense weight from a shard -> the uint8 tensors of its QuantLinear."""

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], *, full_layer_name: str, model: nn.Module, **unused: Any
    ) -> dict[str, Tensor]:
        """The packed tensors by full name, for the one weight in `input_dict`."""
        (value,) = input_dict.values()
        dense: Tensor = value[0] if isinstance(value, list) else value
        layer, _ = get_module_from_name(model, full_layer_name)
        assert isinstance(layer, QuantLinear)
        packed = layer.pack(dense)
        _release_pages(dense)
        prefix = full_layer_name.removesuffix("weight")
        return {prefix + name: nn.Parameter(t, requires_grad=False) for name, t in packed.items()}


class QtuneQuantizer(HfQuantizer):
    """Swaps nn.Linear for QuantLinear before loading and packs weights while loading."""

    requires_calibration = False
    quantization_config: QtuneConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Put an empty QuantLinear where the model has a linear layer that is not skipped."""
        config = self.quantization_config
        # the defaults are the output layer and tied weights, which the shards do not hold
        in_float32 = list(model._keep_in_fp32_modules or ())
        skip = self.get_modules_to_not_convert(
            model, config.skip, in_float32, add_default_skips=True
        )
        targets = {
            name: layer
            for name, layer in model.named_modules()
            if type(layer) is nn.Linear and should_convert_module(name, skip)
        }
        _check_targets(targets, config.group_size)
        dtype = kwargs.get("dtype") or model.dtype
        for name, layer in targets.items():
            model.set_submodule(name, self._empty_layer(layer, dtype))

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        """The model with fused ops: whoever loads it computes the same bits."""
        fuse(model)
        return model

    def _empty_layer(self, layer: nn.Linear, dtype: torch.dtype) -> QuantLinear:
        config = self.quantization_config
        new = QuantLinear(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            format_name=config.format,
            group_size=config.group_size,
            compute_dtype=dtype,
            device="meta",
        )
        if not self.pre_quantized:
            # the loader compares shapes with the dense tensor in the shard before it packs it
            new.weight = nn.Parameter(
                torch.empty_like(layer.weight, dtype=dtype), requires_grad=False
            )
        return new

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        """Whether the tensor of that name arrives dense and must be packed."""
        layer, leaf = get_module_from_name(model, param_name)
        return isinstance(layer, QuantLinear) and leaf == "weight" and not self.pre_quantized

    def get_quantize_ops(self) -> ConversionOps:
        """The operation applied to each tensor that needs it."""
        return Pack()

    def is_serializable(self, **_: Any) -> bool:
        """Yes: `save_pretrained` writes a folder that loads as it is."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Yes: adapters train on it."""
        return True


def register() -> None:
    """Make transformers know `quant_method: qtune`; calling it again changes nothing."""
    if "qtune" not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config("qtune")(QtuneConfig)
        register_quantizer("qtune")(QtuneQuantizer)


def quantized_on_meta(model: PreTrainedModel, config: QtuneConfig) -> None:
    """Swap the linear layers of a model without weights as loading it would."""
    QtuneQuantizer(config, pre_quantized=True)._process_model_before_weight_loading(model)


def _check_targets(layers: dict[str, nn.Linear], group_size: int) -> None:
    """Raises UserError where there is no layer, or the group is wider than the rows of each."""
    if not layers:
        raise UserError(
            "quant: this model has no linear layer that could be quantized; set quant.format: null"
        )
    widest = max(layer.in_features for layer in layers.values())
    if group_size > widest:
        raise UserError(
            f"quant.group_size ({group_size}) fits no layer: the widest row has {widest} weights; "
            f"use {min(64, widest)}"
        )


def _release_pages(tensor: Tensor) -> None:
    """Give the pages of a tensor that lies in a mapped shard back; they can be read again."""
    if tensor.device.type != "cpu" or not hasattr(_libc, "madvise"):
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_PAGEOUT)
