"""LoRA (arXiv 2106.09685) on a QuantLinear, inside PEFT's own layer class.

PEFT finds this class through every LoraConfig, so adapters are made, saved, loaded, merged and
swapped by PEFT as always. Where one plain adapter is active (rsLoRA too: it only scales
differently), the layer and its adapter run as one op, which casts the small adapter matrices to the
dtype of x instead of casting x to theirs. Everything else (DoRA, dropout in training, several
adapters, a trained bias, autocast, INT8 activations) takes PEFT's path.

Beside LoRA, or in its place where the rank is 0, the scales of the layer below may be trained
(`scales.py`); an adapter with `use_qalora` is that of `qa_lora.py`. With `merge_aware.py` the
layer multiplies with the codes that its weights and the adapter have together.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from peft.tuners.lora.layer import LoraVariant
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.nn.functional import linear as dense_linear

from qtune.errors import UserError
from qtune.model.merge_aware import MergedCodes
from qtune.model.qa_lora import QaLora
from qtune.model.scales import TrainedScales
from qtune.quant.linear import QuantLinear
from qtune_kernels.lora import dense_lora_linear, lora_linear

# starts that read the base weight, which PEFT can only do on a dense one
READS_WEIGHT = ("pissa", "olora", "corda", "loftq", "mica", "orthogonal")


class QuantLoraLinear(PeftLoraLinear):
    """PEFT's LoRA layer over a QuantLinear, whose scales may be trained too."""

    trained_scales: TrainedScales | None
    merge_aware: MergedCodes | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_module("trained_scales", None)
        self.register_module("merge_aware", None)
        # the layer below while adapters are enabled, and while they are not, where these differ
        self._below: dict[bool, QuantLinear] = {}

    @property
    def quantized(self) -> QuantLinear:
        """The frozen layer below the adapters."""
        base = self.get_base_layer()
        assert isinstance(base, QuantLinear)
        return base

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any
    ) -> None:
        """Add an adapter; a start that reads the base weight sees it dequantized.

        One of rank 0 has no tensors: it is where trained scales are switched on and off.
        """
        if r == 0:
            self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
            return
        start = config.init_lora_weights
        if isinstance(start, str) and start.lower().split("_niter")[0] in READS_WEIGHT:
            with _dense_weight(self.quantized):
                super().update_layer(
                    adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs
                )
        else:
            super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> LoraVariant | None:
        """What kind of LoRA an adapter is; None: plain."""
        if config.use_qalora:
            return QaLora()
        found: LoraVariant | None = super().resolve_lora_variant(config=config, **kwargs)
        return found

    def train_scales(self, *, zeros: bool) -> None:
        """Train the scales of the layer below, and its zero points if wanted and there are any."""
        self.trained_scales = TrainedScales(self.quantized, zeros=zeros)

    def train_merged(self, *, original: bool = False) -> None:
        """Make room for the codes of weights and adapter together; see `renew_codes`."""
        self.merge_aware = MergedCodes(self.quantized, original=original)

    def renew_codes(self) -> None:
        """Find the codes for the adapter as it is now, where there is room for them."""
        if self.merge_aware is not None:
            self.merge_aware.renew(self.quantized, *self._plain_adapter())

    @property
    def served(self) -> MergedCodes | None:
        """The codes that the layer multiplies with in the place of its own and the adapter."""
        merged = self.merge_aware
        serves = merged is not None and merged.serves and not self.disable_adapters
        return merged if serves else None

    def settle(self, tuned: QuantLinear) -> None:
        """Take a layer with other codes or scales for the one below while adapters are enabled."""
        self._below = {True: tuned, False: self.quantized}
        self.base_layer = tuned

    @property
    def is_settled(self) -> bool:
        """Whether the layer below has trained codes, scales or zero points."""
        return bool(self._below)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch adapters on or off, and trained scales with them."""
        super().enable_adapters(enabled)
        if self._below:
            self.base_layer = self._below[enabled]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y [..., O] of x [..., I]."""
        served = self.served
        if served is not None:
            y: Tensor = served(self.quantized, x, *self._plain_adapter())
            return y
        if self.trained_scales is not None and not self.disable_adapters:
            return self._with_scales(self.trained_scales, x)
        if self._is_qa_lora() and not (args or kwargs or _autocasts(x)):
            (name,) = self.active_adapters
            # not by way of PEFT, which would copy x into float32
            return QaLora.forward(self, name, x, self.quantized(x))
        name = self._only_plain_adapter()
        if name is None or args or kwargs or _autocasts(x):
            return super().forward(x, *args, **kwargs)
        return self._fused(x, name)

    def _plain_adapter(self) -> tuple[Tensor, Tensor, float]:
        """A [R, I], B [O, R] and scaling of the only active adapter."""
        (name,) = self.active_adapters
        return self._matrices(name)

    def _matrices(self, name: str) -> tuple[Tensor, Tensor, float]:
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        assert isinstance(a, Tensor) and isinstance(b, Tensor)
        return a, b, float(self.scaling[name])

    def _fused(self, x: Tensor, name: str) -> Tensor:
        base = self.quantized
        a, b, scaling = self._matrices(name)
        x, a = base.inner_input(x), base.inner_a(a)
        bias = None if base.bias is None else base.bias.to(x.dtype)
        if base.dense is not None and base.dense.dtype == x.dtype:
            return dense_lora_linear(x, base.dense, bias, a, b, scaling)
        packed, scales = base.quant_weight
        weight = packed, *scales, base.format.levels, base.group_size, base.out_features
        return lora_linear(x, *weight, bias, a, b, scaling)

    def _with_scales(self, scales: TrainedScales, x: Tensor) -> Tensor:
        y: Tensor = scales(self.quantized, x)
        for name in self.active_adapters:
            if name in self.lora_A:
                a, b, scaling = self._matrices(name)
                u = dense_linear(self.lora_dropout[name](x), a.to(x.dtype))
                y = y + dense_linear(u, b.to(x.dtype)) * scaling
        return y

    def merged_weight(self, adapter_names: list[str] | None = None) -> Tensor:
        """Dequantized weight plus the adapters' updates, float32 [O, I]."""
        if self.served is not None:
            return self.served.tuned(self.quantized).dequantize(torch.float32)
        scales, base = self.trained_scales, self.quantized
        weight = (base if scales is None else scales.tuned(base)).dequantize(torch.float32)
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
        if self.trained_scales is not None or self.merge_aware is not None:
            raise UserError("trained scales or codes are no part of new codes; export the run")
        weight = self._checked_weight(safe_merge, names)
        if not self.merged_adapters:
            base = self.quantized
            self._unmerged = {name: getattr(base, name) for name in base.tensor_names}
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

    def _is_qa_lora(self) -> bool:
        """Whether a single adapter is active, and is one of `qa_lora.py`."""
        kinds = [type(self.lora_variant.get(name)) for name in self.active_adapters]
        return kinds == [QaLora] and not (self.disable_adapters or self.merged)

    def _only_plain_adapter(self) -> str | None:
        """The active adapter, where it is a single one that the fused function computes exactly."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        base = self.quantized
        trains_bias = base.bias is not None and base.bias.requires_grad
        if len(active) != 1 or self.disable_adapters or self.merged or trains_bias:
            return None
        if not base.fuses_adapter:
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
