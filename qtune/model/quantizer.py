"""The transformers quantizer: packs each tensor as it comes out of its shard.

With it `AutoModelForCausalLM.from_pretrained(folder, quantization_config=QtuneConfig(...))` is the
loader for any architecture, and a folder saved from such a model loads again with `from_pretrained`
after `import qtune`. Peak memory is about the quantized size plus the largest tensor: a shard's
pages are given back once read. Output layers stay dense whatever `skip` says.
"""

import ctypes
import mmap
from collections.abc import Callable
from functools import partial
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

from qtune.errors import UserError
from qtune.model import experts
from qtune.model.fused import fuse
from qtune.model.quant_config import QtuneConfig
from qtune.quant.linear import QuantLinear
from qtune.quant.storage import GroupSize, Storage
from qtune.quant.vector_linear import layer_type

__all__ = ["QtuneConfig", "QtuneQuantizer", "quantized_on_meta", "register"]

# advice to the kernel that never loses anything: what is not in a file stays where it is
MADV_PAGEOUT = 21
_libc = ctypes.CDLL(None)


class Pack(ConversionOps):
    """A dense weight from a shard -> the uint8 tensors of its QuantLinear, or of each expert's.

    `maker` gives, for the name of a fused weight of experts, what makes their empty layers.
    """

    def __init__(self, maker: Callable[[str], experts.MakeLayer]) -> None:
        self._maker = maker

    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        *,
        full_layer_name: str,
        model: nn.Module,
        missing_keys: set[str] | None = None,
        **unused: Any,
    ) -> dict[str, Tensor]:
        """The packed tensors by full name, for the one weight in `input_dict`."""
        (value,) = input_dict.values()
        dense: Tensor = value[0] if isinstance(value, list) else value
        layer, leaf = get_module_from_name(model, full_layer_name)
        if isinstance(layer, QuantLinear):
            packed = layer.pack(dense)
        else:
            experts.take_layers(layer, self._maker(full_layer_name), leaf)
            packed = experts.pack(layer, leaf, dense)
            if missing_keys is not None:
                # the fused weight, which the model no longer has
                missing_keys.discard(full_layer_name)
        release_pages(dense)
        prefix = full_layer_name.removesuffix(leaf)
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
        self._dtype = kwargs.get("dtype") or model.dtype
        layers = dict(model.named_modules())
        chosen = {n: m for n, m in layers.items() if should_convert_module(n, skip)}
        linears = {n: m for n, m in chosen.items() if type(m) is nn.Linear}
        mixtures = {n: m for n, m in chosen.items() if experts.is_experts(m)}
        self._mixtures = list(mixtures.values())
        _check_targets(linears, self._mixtures, config.group_size)
        for name, layer in linears.items():
            model.set_submodule(name, self._empty_layer(layer, config.storage(name)))
        for name, mixture in mixtures.items() if self.pre_quantized else ():
            for leaf in experts.fused_weights(mixture):
                experts.take_layers(mixture, self._expert_maker(f"{name}.{leaf}"), leaf)

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        """The model with fused ops: whoever loads it computes the same bits."""
        fuse(model)
        # saving would take them for a way back to a dense checkpoint
        inside: Any = model
        inside._weight_conversions = []
        return model

    def _empty_layer(self, layer: nn.Linear, storage: Storage) -> QuantLinear:
        """A layer in the place of this one, without its codes."""
        sizes = layer.in_features, layer.out_features
        new = self._quant_linear(*sizes, storage=storage, bias=layer.bias is not None)
        if not self.pre_quantized:
            # the loader compares shapes with the dense tensor in the shard before it packs it
            weight = torch.empty_like(layer.weight, dtype=new.compute_dtype)
            new.weight = nn.Parameter(weight, requires_grad=False)
        return new

    def _expert_maker(self, name: str) -> experts.MakeLayer:
        """What makes the empty layers of the experts behind a fused weight."""
        storage = self.quantization_config.expert_storage(name)
        return partial(self._quant_linear, storage=storage)

    def _quant_linear(
        self, in_features: int, out_features: int, *, storage: Storage, bias: bool = False
    ) -> QuantLinear:
        options: dict[str, Any] = {"compute_dtype": self._dtype, "device": "meta"}
        made = layer_type(storage)
        return made(in_features, out_features, bias, storage=storage, **options)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        """Whether the tensor of that name arrives dense and must be packed."""
        layer, leaf = get_module_from_name(model, param_name)
        linear = isinstance(layer, QuantLinear) and leaf == "weight"
        fused = leaf in experts.MATRICES and layer in self._mixtures
        return (linear or fused) and not self.pre_quantized

    def get_quantize_ops(self) -> ConversionOps:
        """The operation applied to each tensor that needs it."""
        return Pack(self._expert_maker)

    def is_serializable(self, **_: Any) -> bool:
        """Yes: `save_pretrained` writes a folder that loads as it is."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Yes: adapters train on it."""
        return True


def register() -> None:
    """Make transformers know `quant_method: qtune`; calling it again changes nothing."""
    experts.register()
    if "qtune" not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config("qtune")(QtuneConfig)
        register_quantizer("qtune")(QtuneQuantizer)


def quantized_on_meta(model: PreTrainedModel, config: QtuneConfig) -> None:
    """Swap the linear layers of a model without weights as loading it would."""
    QtuneQuantizer(config, pre_quantized=True)._process_model_before_weight_loading(model)


def _check_targets(
    linears: dict[str, nn.Linear], mixtures: list[nn.Module], group_size: GroupSize
) -> None:
    """Raises UserError where there is no layer, or the group is wider than the rows of each."""
    widths = [layer.in_features for layer in linears.values()]
    widths += [w.shape[-1] for m in mixtures for w in experts.fused_weights(m).values()]
    if not widths:
        raise UserError(
            "quant: this model has no linear layer that could be quantized; set quant.format: null"
        )
    if isinstance(group_size, int) and group_size > max(widths):
        raise UserError(
            f"quant.group_size ({group_size}) fits no layer: the widest row has {max(widths)} "
            f"weights; use {min(64, max(widths))}"
        )


def release_pages(tensor: Tensor) -> None:
    """Give the pages of a tensor that lies in a mapped shard back; they can be read again."""
    if tensor.device.type != "cpu" or not hasattr(_libc, "madvise"):
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_PAGEOUT)
