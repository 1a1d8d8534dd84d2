"""A form of a model as lines of a recipe, for `qtune train` and exports alike."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from qtune.planning.candidates import Candidate
from qtune.planning.footprint import Request
from qtune.yaml_document import to_yaml


def fragment(candidate: Candidate, request: Request) -> str:
    """YAML text of the keys that the plan decides; what else a recipe needs is not in it."""
    parts: dict[str, Any] = {"model": candidate.footprint.name, "quant": _quant(candidate)}
    if request.serve:
        return to_yaml(parts)
    parts["lora"] = {"rank": request.rank}
    if candidate.quant.method == "gptq":
        # with a Hessian at hand, the start that repairs most costs little
        parts["lora"]["init"] = "cloq"
    parts["data"] = {"max_length": request.context}
    parts["train"] = {
        "micro_batch_tokens": request.batch * request.context,
        "optimizer": request.optimizer,
    }
    return to_yaml(parts)


def shortened(formats: Mapping[str, str], usual: str) -> dict[str, str]:
    """Entries for `quant.layers` that give every layer its format, the fewest of a simple kind.

    One for all layers with the same last part of their name, and one for each that is different.
    """
    groups: dict[str, dict[str, str]] = defaultdict(dict)
    for layer, name in formats.items():
        groups[layer.rpartition(".")[2]][layer] = name
    entries: dict[str, str] = {}
    for last, group in groups.items():
        common = Counter(group.values()).most_common(1)[0][0]
        if common != usual:
            entries[last] = common
        entries |= {layer: name for layer, name in group.items() if name != common}
    return entries


def _quant(candidate: Candidate) -> dict[str, Any]:
    quant = candidate.quant
    if quant.format is None:
        return {"format": None}
    chosen: dict[str, Any] = {"format": quant.format, "group_size": quant.group_size}
    if quant.method != "nearest":
        chosen["method"] = quant.method
    if quant.rotate:
        chosen["rotate"] = True
    if quant.layers:
        formats = {name: quant.layers.get(name, quant.format) for name in candidate.sizes.layers}
        chosen["layers"] = shortened(formats, quant.format)
    return chosen
