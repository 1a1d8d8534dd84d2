"""QA-LoRA (arXiv 2309.14717): a low-rank update that merges into zero points without loss.

A sees the sums of inputs over quantization groups, A [R, I / G], so all weights of a group change
by the same amount, and that is what a zero point does: (level - zero) scale + c is
(level - (zero - c / scale)) scale. Merged zero points are float32 numbers, and any format can have
them. Formulas, names and the scaling of pooled inputs (their mean times the number of groups) are
those of PEFT, which knows QA-LoRA over GPTQ's layers only.
"""

from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn
from torch.nn.functional import linear as dense_linear

from qtune.errors import UserError
from qtune.model.scales import decoded, with_scales
from qtune.quant.linear import QuantLinear


class QaLora(LoraVariant):
    """What PEFT's layer asks of a kind of LoRA, for QA-LoRA over a QuantLinear."""

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **_: Any) -> None:
        """Put an A [R, I / G] in the place of that [R, I]."""
        base, weight = base_of(module), _matrix(module.lora_A, adapter_name)
        module.lora_A[adapter_name] = nn.Linear(
            base.in_features // base.group_size,
            weight.shape[0],
            bias=False,
            device=weight.device,
            dtype=weight.dtype,
        )

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **_: Any
    ) -> Tensor:
        """What the layer gives, [..., O], plus the update's share for x [..., I]."""
        rows = pooled(base_of(module), module.lora_dropout[active_adapter](x))
        a, b = (_matrix(part, active_adapter) for part in (module.lora_A, module.lora_B))
        update = dense_linear(dense_linear(rows, a.to(rows.dtype)), b.to(rows.dtype))
        return result + update * float(module.scaling[active_adapter])

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The weight [O, I] with the update added."""
        base = base_of(module)
        tuned = merged(module, active_adapter).dequantize(torch.float32)
        return orig_weight + (tuned - base.dequantize(torch.float32))


def base_of(module: LoraLayer) -> QuantLinear:
    """The frozen layer below the adapters."""
    base = module.get_base_layer()
    assert isinstance(base, QuantLinear)
    return base


def pooled(base: QuantLinear, x: Tensor) -> Tensor:
    """Inputs [..., I] pooled over the groups of a row, [..., I / G]."""
    inner = base.inner_input(x)
    groups = inner.view(*inner.shape[:-1], -1, base.group_size)
    return groups.mean(-1) * groups.shape[-2]


def check_groups(name: str, base: QuantLinear) -> None:
    """Raises UserError where groups are not parts of rows, so that inputs cannot be pooled."""
    if base.in_features % base.group_size:
        raise UserError(
            f"adapter: qa-lora: groups of {base.group_size} weights are not parts of the rows of "
            f"{name}, which have {base.in_features}; take a smaller quant.group_size, or row"
        )


@torch.no_grad()
def merged(module: LoraLayer, adapter_name: str) -> QuantLinear:
    """The layer with the update in its zero points, which are float32; scales are as they were.

    Raises UserError where a group's scale is zero, which no zero point can change.
    """
    base = base_of(module)
    num_pooled = base.in_features // base.group_size
    a, b = (_matrix(part, adapter_name).float() for part in (module.lora_A, module.lora_B))
    change = (b @ a).view(-1) * (module.scaling[adapter_name] * num_pooled / base.group_size)
    found = decoded(base)
    dead = (found.scales == 0) & (change != 0)
    if dead.any():
        raise UserError(
            f"{int(dead.sum())} groups of a layer {list(base.shape)} hold zeros alone and have no "
            "scale, so the update of adapter: qa-lora has no place in them; train adapter: lora"
        )
    moved = (change / found.scales).where(found.scales != 0, 0)
    zeros = -moved if found.zeros is None else found.zeros - moved
    return with_scales(base, base.quant_weight.scales._replace(zeros=zeros))


def _matrix(parts: nn.ModuleDict, adapter_name: str) -> Tensor:
    weight = parts[adapter_name].weight
    assert isinstance(weight, Tensor)
    return weight
