"""A form for a model by what `qtune sense` has measured of it: one format, or one for each layer.

What layers lose is taken to add up, so the formats that lose least within a number of bytes are a
knapsack (`quant/allocate.py`).
"""

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from qtune.errors import UserError
from qtune.planning.footprint import Footprint, Request
from qtune.planning.sizes import Sizes
from qtune.quant.allocate import Option, allocate
from qtune.recipe import FormatName, Quant
from qtune.sensing.sensitivity import SenseFile

Options = Mapping[str, Sequence[Option]]


class Measurements:
    """What was measured of one model's layers."""

    def __init__(self, sense: SenseFile) -> None:
        self._sense = sense

    def form(self, format_name: FormatName) -> Quant:
        """The format with the settings under which layers were measured."""
        header = self._sense.header
        return Quant(
            format=format_name,
            method=header.method,
            rotate=header.rotate,
            group_size=header.group_size,
        )

    def lost(self, footprint: Footprint, format_name: FormatName) -> float | None:
        """Nats a token lost in that format; None where it was not measured of all layers."""
        losses = self._losses.get(format_name, {})
        layers = footprint.sizes(self.form(format_name)).layers
        return sum(losses.values()) if losses.keys() == layers.keys() else None

    def model_among(self, footprints: Sequence[Footprint]) -> Footprint:
        """The model that was measured; UserError where it is none of these."""
        header, measured = self._sense.header, {it.layer for it in self._sense.found}
        alike = [it for it in footprints if measured == set(it.sizes(Quant(format=None)).layers)]
        named = [it for it in alike if it.name == header.model]
        if not alike:
            raise UserError(
                f"{self._sense.path} measures layers of {header.model}, which are not those of "
                f"{', '.join(it.name for it in footprints)}; run qtune sense on that model to its "
                "end"
            )
        return (named or alike)[0]

    def mixture(
        self,
        footprint: Footprint,
        request: Request,
        formats: Collection[FormatName] | None = None,
        bits_budget: float | None = None,
    ) -> tuple[Quant, float] | None:
        """Formats layer by layer, as many bits as memory and budget allow, and the nats lost.

        None where no layer, or not every one, was measured in one of `formats`.
        """
        options = self._options(footprint, formats)
        usual = self.form("int4")
        found = footprint.sizes(usual)
        if options.keys() != found.layers.keys():
            return None
        budget = _budget(footprint, usual, request, bits_budget)
        chosen = allocate(options, max(budget, _least(options)))
        return _with_formats(usual, chosen.formats, found), chosen.loss

    @cached_property
    def _losses(self) -> dict[FormatName, dict[str, float]]:
        losses: dict[FormatName, dict[str, float]] = defaultdict(dict)
        for it in self._sense.found:
            losses[it.format][it.layer] = it.divergence
        return dict(losses)

    def _options(self, footprint: Footprint, formats: Collection[FormatName] | None) -> Options:
        """The measured formats of each layer, with the bytes that they take here.

        What made numbers overflow is none.
        """
        options: dict[str, list[Option]] = defaultdict(list)
        for name, losses in self._losses.items():
            if formats is None or name in formats:
                layers = footprint.sizes(self.form(name)).layers
                for layer, loss in losses.items():
                    if math.isfinite(loss):
                        options[layer].append(Option(name, layers[layer][1], loss))
        return options


def _budget(footprint: Footprint, usual: Quant, request: Request, bits_budget: float | None) -> int:
    """Bytes for the quantized layers: what memory leaves for them, and what the budget allows."""
    found = footprint.sizes(usual)
    left = request.memory_bytes - footprint.need(usual, request).total + found.layer_bytes
    return left if bits_budget is None else min(left, int(bits_budget * found.layer_weights / 8))


def _least(options: Options) -> int:
    return sum(min(option.size_bytes for option in choices) for choices in options.values())


def _with_formats(usual: Quant, formats: Mapping[str, FormatName], found: Sizes) -> Quant:
    """The form whose layers have these formats; that of most weights is the usual one."""
    weights: Counter[FormatName] = Counter()
    for layer, name in formats.items():
        weights[name] += found.layers[layer][0]
    most = weights.most_common(1)[0][0]
    others = {layer: name for layer, name in formats.items() if name != most}
    return replace(usual, format=most, layers=others)
