"""Which layers get an adapter: the recipe's names against the layers that there are.

In a mixture of experts `all-linear` means the layers outside the experts, and of these not the ones
whose names PEFT takes for the experts' (`gate_proj` and its kin): it would look for fused weights
behind them, and the adapter of a quantized model has to load on the original one too. With
`lora.experts` every quantized expert gets an adapter; PEFT knows no such layers elsewhere, so
that one is only exported merged.
"""

from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PreTrainedModel

from qtune.errors import UserError
from qtune.model.experts import expert_layers, is_experts
from qtune.quant.linear import QuantLinear
from qtune.recipe import Lora

# what PEFT 0.21 rewrites to adapters of fused experts, in models that have some
TAKEN_FOR_EXPERTS = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}


def adapter_targets(model: PreTrainedModel, settings: Lora) -> str | list[str]:
    """PEFT's `target_modules` for these settings.

    Raises UserError for names that match no layer, that PEFT would take for others, and where
    adapters of experts are wanted and there are no quantized experts.
    """
    _check_names(model, settings)
    experts = [name for _, _, layers in expert_layers(model) for name in layers]
    if settings.experts and not experts:
        raise UserError("lora.experts: this model has no quantized experts; set it to false")
    targets = plain(settings.target_modules)
    if not _is_mixture(model):
        return targets
    given = _outside(model, experts) if targets == "all-linear" else set(targets)
    taken = sorted(given & TAKEN_FOR_EXPERTS)
    if taken and targets != "all-linear":
        raise UserError(
            f"lora.target_modules: '{taken[0]}' is what PEFT calls the experts of a mixture; leave "
            "it out, and set lora.experts: true for adapters on them"
        )
    last = {name.rpartition(".")[2] for name in experts} if settings.experts else set()
    return sorted((given - TAKEN_FOR_EXPERTS) | last)


def plain(targets: str | tuple[str, ...]) -> str | list[str]:
    """The recipe's `target_modules` as PEFT takes it: `all-linear` or a list."""
    if targets == "all-linear":
        return targets
    return [targets] if isinstance(targets, str) else list(targets)


def _is_mixture(model: nn.Module) -> bool:
    return any(expert_layers(model)) or any(is_experts(module) for module in model.modules())


def _outside(model: PreTrainedModel, experts: list[str]) -> set[str]:
    """The last parts of the names of linear layers that are neither experts nor the output."""
    head = model.get_output_embeddings()
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    return {name.rpartition(".")[2] for name in linears.difference(experts)}


def _check_names(model: nn.Module, settings: Lora) -> None:
    """Raises UserError for names that match no layer and for full training of a quantized one."""
    linears = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linears}))
    targets = plain(settings.target_modules)
    for target in [] if targets == "all-linear" else targets:
        if not any(name == target or name.endswith("." + target) for name in linears):
            raise UserError(f"lora.target_modules: '{target}' matches no layer; there are: {known}")
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(settings, field):
            if not any(get_pattern_key([pattern], name) == pattern for name in linears):
                raise UserError(f"lora.{field}: '{pattern}' matches no layer; there are: {known}")
    for target in settings.modules_to_save:
        _check_trainable(model, target)


def _check_trainable(model: nn.Module, target: str) -> None:
    """Raises UserError unless modules of that name exist and hold no codes."""
    found = [module for name, module in model.named_modules() if name.endswith(target)]
    if not found:
        raise UserError(f"lora.modules_to_save: '{target}' matches no module of the model")
    if any(isinstance(part, QuantLinear) for module in found for part in module.modules()):
        raise UserError(
            f"lora.modules_to_save: '{target}' is quantized and cannot be trained in full; "
            f"add it to quant.skip"
        )
