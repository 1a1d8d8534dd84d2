"""LoRA (arXiv 2106.09685) on a QuantLinear, inside PEFT's own layer class.

PEFT finds this class through every LoraConfig, so adapters are made, saved, loaded, merged and
swapped by PEFT as always. Where one plain adapter is active (rsLoRA too: it only scales
differently), the layer and its adapter run as one op, which casts the small adapter matrices to the
dtype of x instead of casting x to theirs. Everything else (DoRA, dropout in training, several
adapters, a trained bias, autocast) takes PEFT's path.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from qtune.errors import UserError
from qtune.quant.linear import TENSORS, QuantLinear
from qtune_kernels.lora import dense_lora_linear, lora_linear

# starts that read the base weight, which PEFT can only do on a dense one
READS_WEIGHT = ("pissa", "olora", "corda", "loftq", "mica", "orthogonal")


class QuantLoraLinear(PeftLoraLinear):
    """PEFT's LoRA layer over a QuantLinear."""

    @property
    def quantized(self) -> QuantLinear:
        """The frozen layer below the adapters."""
        base = self.get_base_layer()
        assert isinstance(base, QuantLinear)
        return base

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any
    ) -> None:
        """Add an adapter; a start that reads the base weight sees it dequantized."""
        start = config.init_lora_weights
        if isinstance(start, str) and start.lower().split("_niter")[0] in READS_WEIGHT:
            with _dense_weight(self.quantized):
                super().update_layer(
                    adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs
                )
        else:
            super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y [..., O] of x [..., I]."""
        name = self._only_plain_adapter()
        if name is None or args or kwargs or _autocasts(x):
            return super().forward(x, *args, **kwargs)
        return self._fused(x, name)

    def _fused(self, x: Tensor, name: str) -> Tensor:
        base, scaling = self.quantized, float(self.scaling[name])
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        assert isinstance(a, Tensor) and isinstance(b, Tensor)
        bias = None if base.bias is None else base.bias.to(x.dtype)
        if base.dense is not None and base.dense.dtype == x.dtype:
            return dense_lora_linear(x, base.dense, bias, a, b, scaling)
        packed, scales = base.quant_weight
        weight = packed, *scales, base.format.levels, base.group_size, base.out_features
        return lora_linear(x, *weight, bias, a, b, scaling)

    def merged_weight(self, adapter_names: list[str] | None = None) -> Tensor:
        """Dequantized weight plus the adapters' updates, float32 [O, I]."""
        weight = self.quantized.dequantize(torch.float32)
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.lora_A:
                continue
            if self.lora_bias[name]:
                raise UserError(f"adapter '{name}' has lora_bias, which qtune cannot merge")
            if name in self.lora_variant:
                weight = self.lora_variant[name].merge_safe(self, name, weight)
            else:
                weight = weight + self.get_delta_weight(name).float()
        return weight

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the codes in place, which rounds most of a small update away.

        `unmerge` brings the exact codes back. To keep the update, merge into 16 bits
        (`merge_and_unload`).
        """
        names = check_adapters_to_merge(self, adapter_names)
        if not names:
            return
        weight = self._checked_weight(safe_merge, names)
        if not self.merged_adapters:
            self._unmerged = {key: getattr(self.quantized, key) for key in TENSORS}
        self.quantized.quantize(weight)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the codes from before `merge` back."""
        if self.merged_adapters:
            for key, tensor in self._unmerged.items():
                setattr(self.quantized, key, tensor)
            del self._unmerged
            self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The layer without adapters: dense in `compute_dtype` with them merged, or as it was."""
        base = self.quantized
        if not merge:
            return base
        weight = self._checked_weight(safe_merge, adapter_names)
        dense = nn.Linear(base.in_features, base.out_features, base.bias is not None, device="meta")
        dense.weight = nn.Parameter(weight.to(base.compute_dtype), requires_grad=False)
        if base.bias is not None:
            dense.bias = base.bias
        return dense

    def _checked_weight(self, safe: bool, adapter_names: list[str] | None) -> Tensor:
        weight = self.merged_weight(adapter_names)
        if safe and not torch.isfinite(weight).all():
            raise ValueError("the merged weight is not finite: an adapter is broken")
        return weight

    def _only_plain_adapter(self) -> str | None:
        """The active adapter, where it is a single one that the fused function computes exactly."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        bias = self.quantized.bias
        trains_bias = bias is not None and bias.requires_grad
        if len(active) != 1 or self.disable_adapters or self.merged or trains_bias:
            return None
        (name,) = active
        drops = self.training and not isinstance(self.lora_dropout[name], nn.Identity)
        plain = not (drops or name in self.lora_variant or self.lora_bias[name])
        return name if plain else None


def register() -> None:
    """Make every LoraConfig know QuantLoraLinear; calling it again changes nothing.

    PEFT neither saves the mapping of custom layers nor asks anybody for it when it loads an
    adapter, so it is set whenever a LoraConfig is made.
    """
    original = LoraConfig.__post_init__
    if getattr(original, "knows_qtune", False):
        return

    def post_init(self: LoraConfig) -> None:
        original(self)  # type: ignore[no-untyped-call]
        self._register_custom_module({QuantLinear: QuantLoraLinear})

    post_init.knows_qtune = True  # type: ignore[attr-defined]
    LoraConfig.__post_init__ = post_init  # type: ignore[method-assign]


@contextmanager
def _dense_weight(base: QuantLinear) -> Iterator[None]:
    """Meanwhile `weight` is the dequantized matrix in float32; a changed one is quantized again."""
    packed = base.weight
    dense = base.dequantize(torch.float32)
    base.weight = nn.Parameter(dense.clone(), requires_grad=False)
    try:
        yield
        changed = base.weight.detach()
    finally:
        base.weight = packed
    if not torch.equal(changed, dense):
        base.quantize(changed)


def _autocasts(x: Tensor) -> bool:
    # the plan runs the model on `meta`, which autocast does not know
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
