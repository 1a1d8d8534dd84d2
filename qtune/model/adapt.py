"""What a recipe trains, put onto its base: `adapter: lora`, `scales`, `lora + scales`, `qa-lora`.

All four are a PeftModel, so that training, checkpoints and results know one kind of model. With
`scales` alone its layers have rank 0: PEFT's wrapper, and nothing of LoRA in it.

With `train.merge_aware` LoRA is trained into the codes (`merge_aware.py`).

When the adapter of a finished run is loaded, trained scales and codes become the base's own, and
the update of QA-LoRA its zero points: what is measured, merged and exported is an ordinary
quantized layer, the very one that is served. `disable_adapter` still shows the base as it was.
"""

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel

from qtune.errors import UserError
from qtune.model import codes_file, scales_file
from qtune.model.load import add_adapter
from qtune.model.lora import QuantLoraLinear
from qtune.model.qa_lora import check_groups, merged
from qtune.model.quant_config import QtuneConfig
from qtune.model.targets import adapter_targets
from qtune.quant.linear import QuantLinear
from qtune.quant.storage import Storage
from qtune.recipe import Recipe


def adapt(model: PreTrainedModel, recipe: Recipe) -> PeftModel:
    """The model with what the recipe trains on it, fresh, in float32.

    Raises UserError for settings that match no layer, and for a base on which `recipe.adapter`
    cannot be trained.
    """
    if recipe.adapter == "lora" and not recipe.train.merge_aware:
        return add_adapter(model, recipe.lora)
    _check_recipe(recipe)
    layers = _target_layers(model, recipe)
    for name, layer in layers.items():
        _check_layer(name, layer, recipe)
    if recipe.train.merge_aware:
        adapted = add_adapter(model, recipe.lora, target_modules=list(layers))
        for _, wrapper in quant_lora_layers(adapted):
            wrapper.train_merged(original=knows_originals(recipe))
        return adapted
    if recipe.adapter == "qa-lora":
        return add_adapter(model, recipe.lora, use_qalora=True, target_modules=list(layers))
    alone = {"r": 0, "rank_pattern": {}, "target_modules": list(layers)}
    adapted = add_adapter(model, recipe.lora, **(alone if recipe.adapter == "scales" else {}))
    for _, wrapper in quant_lora_layers(adapted):
        wrapper.train_scales(zeros=recipe.scales.zeros)
    return adapted


def load_trained(base: PreTrainedModel, folder: Path) -> PeftModel:
    """The base with the adapter of a run folder on it, ready for evaluation.

    Raises UserError where trained codes or scales do not fit the base.
    """
    model = PeftModel.from_pretrained(base, folder).eval()
    codes_file.put(model, codes_file.read(folder))
    tuned = scales_file.put(model, scales_file.read(folder))
    if getattr(model.active_peft_config, "use_qalora", False):
        tuned |= _merge_qa_lora(model)
    config = getattr(base.config, "quantization_config", None)
    if tuned and isinstance(config, QtuneConfig):
        base.config.quantization_config = with_storages(config, tuned)
    return model


def quant_lora_layers(model: PeftModel) -> Iterator[tuple[str, QuantLoraLinear]]:
    """The layers that PEFT put around quantized ones, by their names in the base model."""
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, QuantLoraLinear):
            yield name, layer


def with_storages(config: QtuneConfig, layers: dict[str, QuantLinear]) -> QtuneConfig:
    """The configuration of a model in which these layers, by name, are stored as they now are."""
    made = QtuneConfig(**config.to_dict())
    usual = config.storage("")
    for name, layer in layers.items():
        made.layers[name] = {
            field.name: getattr(layer.storage, field.name)
            for field in fields(Storage)
            if getattr(layer.storage, field.name) != getattr(usual, field.name)
        }
    return made


def knows_originals(recipe: Recipe) -> bool:
    """Whether a merge-aware run is to know the original weights; see `served_codes`."""
    return recipe.train.merge_aware_originals and recipe.quant.method == "nearest"


def _merge_qa_lora(model: PeftModel) -> dict[str, QuantLinear]:
    """Put updates into zero points; of the adapter nothing remains."""
    (adapter,) = model.active_adapters
    tuned = {}
    for name, layer in quant_lora_layers(model):
        tuned[name] = merged(layer, adapter)
        layer.delete_adapter(adapter)
        layer.settle(tuned[name])
    # written again, it is the adapter of what was trained beside the updates
    model.active_peft_config.use_qalora, model.active_peft_config.r = False, 0
    return tuned


def _target_layers(model: PreTrainedModel, recipe: Recipe) -> dict[str, QuantLinear]:
    """The quantized layers that the recipe's targets name. Raises UserError where there is none."""
    targets, head = adapter_targets(model, recipe.lora), model.get_output_embeddings()
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, QuantLinear) and layer is not head and _is_target(name, targets)
    }
    if not layers:
        raise UserError(
            f"adapter: {recipe.adapter}: lora.target_modules names no quantized layer; see "
            "quant.skip"
        )
    if recipe.scales.zeros and not any(layer.storage.zero_kind for layer in layers.values()):
        raise UserError(
            f"scales.zeros: quant.format: {recipe.quant.format} has no zero points; set it to "
            "false, or take int4, int3 or int2"
        )
    return layers


def _is_target(name: str, targets: str | list[str]) -> bool:
    if isinstance(targets, str):
        # all-linear, which leaves the experts of a mixture and the output layer out
        return ".expert_" not in name
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _check_recipe(recipe: Recipe) -> None:
    if recipe.train.merge_aware:
        _check_merge_aware(recipe)
    elif recipe.lora.dora:
        raise UserError(
            f"lora.dora goes by the length of frozen weights, which adapter: {recipe.adapter} "
            "changes; set it to false"
        )


def _check_merge_aware(recipe: Recipe) -> None:
    """Raises UserError for what is no change of weights that codes could take in."""
    lora, where = recipe.lora, "train.merge_aware puts one plain adapter into the codes"
    if recipe.quant.format is None:
        raise UserError(f"{where}, of which there are none; set quant.format")
    if recipe.adapter != "lora":
        raise UserError(f"{where}; set adapter: lora and not {recipe.adapter}")
    for key in ("dora", "dropout", "experts"):
        if getattr(lora, key):
            raise UserError(f"{where}, which lora.{key} is not for; leave it out")
    if lora.init != "zero":
        raise UserError(
            f"{where}, where what lora.init: {lora.init} begins with would move codes before "
            "anything is learned; set it to zero"
        )


def _check_layer(name: str, layer: QuantLinear, recipe: Recipe) -> None:
    if recipe.train.merge_aware:
        _check_has_nearest(layer)
        return
    where = f"adapter: {recipe.adapter}"
    if layer.storage.activations is not None:
        raise UserError(
            f"{where}: quant.activations: int8 multiplies integers, which passes no gradient to "
            "scales; leave it out"
        )
    if layer.storage.format == "e8p":
        raise UserError(
            f"{where}: e8p has one scale for a whole matrix and no zero points; train "
            "adapter: lora, or take quant.format: int2"
        )
    if recipe.adapter == "qa-lora":
        check_groups(name, layer)


def _check_has_nearest(layer: QuantLinear) -> None:
    """Raises UserError where a changed weight has no nearest code, or no gradient through it."""
    if layer.storage.activations is not None:
        raise UserError(
            "train.merge_aware: quant.activations: int8 multiplies integers, which passes no "
            "gradient; leave it out"
        )
    if layer.storage.format == "e8p":
        raise UserError(
            "train.merge_aware: a code of e8p is of eight weights together, which have no "
            "boundary each; take quant.format: int2"
        )
