"""The layers of a model that is trained merge-aware, all together."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft import PeftModel
from torch import Tensor, nn

from qtune.errors import UserError
from qtune.model.checkpoint import Names, bare_name, stored_names, stored_tensor
from qtune.model.lora import QuantLoraLinear
from qtune.model.merge import base_model


def take_originals(model: PeftModel, folder: Path) -> None:
    """Let the layers know where the 16-bit weights in `folder` lie, one tensor at a time.

    Nothing where no layer has room for that. Raises UserError for a weight that is not there.
    """
    layers = _layers(model.get_base_model())
    wanted = {path: layer for path, layer in layers.items() if _has_room(layer)}
    if not wanted:
        return
    names = Names.of(base_model(model))
    places = {names.in_model(name): (path, name) for name, path in stored_names(folder).items()}
    for path, layer in wanted.items():
        assert layer.merge_aware is not None
        weight = _original(bare_name(f"{path}.weight"), places, folder)
        layer.merge_aware.take(layer.quantized, weight)


def renew(model: nn.Module) -> None:
    """Find the codes of all layers for the adapter as it is now."""
    for layer in _layers(model).values():
        layer.renew_codes()


def serve(model: nn.Module, on: bool) -> None:
    """Let the layers multiply with their codes as they were last found, or be those of LoRA."""
    for layer in _layers(model).values():
        assert layer.merge_aware is not None
        layer.merge_aware.serves = on


@contextmanager
def serving(model: nn.Module) -> Iterator[None]:
    """Meanwhile the model is what it is served as, with codes for the adapter as it is now."""
    before = any(layer.served is not None for layer in _layers(model).values())
    renew(model)
    serve(model, True)
    try:
        yield
    finally:
        serve(model, before)


def _layers(model: nn.Module) -> dict[str, QuantLoraLinear]:
    """The layers that are trained so, by their paths."""
    return {
        path: layer
        for path, layer in model.named_modules()
        if isinstance(layer, QuantLoraLinear) and layer.merge_aware is not None
    }


def _has_room(layer: QuantLoraLinear) -> bool:
    return layer.merge_aware is not None and layer.merge_aware.places is not None


def _original(name: str, places: dict[str, tuple[Path, str]], folder: Path) -> Tensor:
    """The stored weight of that name."""
    weight = stored_tensor(*places[name]) if name in places else None
    if weight is None or not weight.is_floating_point():
        raise UserError(
            f"train.merge_aware rounds from the 16-bit weights, and {folder} has no {name} in 16 "
            "bits; name the 16-bit model, or set train.merge_aware_originals: false"
        )
    return weight
