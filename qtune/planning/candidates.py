"""Forms of models that could be trained or used in some memory, and which of them is the best.

A form is a number format with the method that suits it. What each takes is counted (`footprint`);
what it loses is looked up (`expected_loss`), or is what `qtune sense` has measured of the model,
where losses of layers are taken to add up. With measurements the formats are also chosen layer by
layer (`quant/allocate.py`), for as many bytes as there are.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from qtune.errors import UserError
from qtune.planning.expected_loss import LEAST_FOR_LOW_BITS, expected_loss, gain_of_size
from qtune.planning.footprint import Footprint, Need, Request
from qtune.planning.sizes import Sizes
from qtune.progress import bar
from qtune.quant.allocate import Option, allocate
from qtune.quant.format import format_names, load_format
from qtune.recipe import FormatName, Quant
from qtune.sensing.sensitivity import SenseFile, shared_losses

PROPOSED: tuple[FormatName | None, ...] = (None, "int8", "nf4", "int4", "int3", "int2", "e8p")
# formats for which codes are each chosen by itself: with 8 bits nothing is left to gain, and NF4 is
# what others mean by QLoRA
NEAREST = {"int8", "nf4", "fp4", "ternary"}


@dataclass(frozen=True)
class Candidate:
    """A model in some form, with what it needs and loses."""

    footprint: Footprint
    quant: Quant
    sizes: Sizes
    need: Need
    lost: float
    """Nats a token against the model's own 16-bit form, expected or measured."""
    measured: bool

    @property
    def name(self) -> str:
        """The form in words."""
        if self.quant.layers:
            return "mixed"
        return self.quant.format or "16-bit"

    @property
    def rank(self) -> tuple[float, int]:
        """Smaller is better: expected loss among models of one family, then bytes."""
        return self.lost - gain_of_size(self.footprint.num_parameters), self.need.total

    def fits(self, request: Request) -> bool:
        """Whether it takes no more than there is."""
        return self.need.total <= request.memory_bytes


def form(format_name: FormatName | None) -> Quant:
    """The format with the method that is recommended for it."""
    if format_name is None or format_name in NEAREST:
        return Quant(format=format_name)
    return Quant(format=format_name, method="gptq", rotate=format_name != "e8p")


def candidates(
    footprints: Sequence[Footprint],
    request: Request,
    formats: Sequence[FormatName] | None = None,
    bits_budget: float | None = None,
    sense: SenseFile | None = None,
) -> list[Candidate]:
    """All forms of all models, best first, those that do not fit among them.

    Without `formats`, those of PROPOSED; `bits_budget` is the most bits a weight of the quantized
    layers may take on average. Raises UserError where no form has so few bits, and where the
    measurements are of another model.
    """
    wanted = [(model, form(name)) for model in footprints for name in _formats(model, formats)]
    found = []
    with bar("forms", len(wanted)) as progress:
        for footprint, quant in wanted:
            found.append(_candidate(footprint, quant, request, sense))
            progress.advance(words=footprint.label)
    if sense is not None:
        mixed = _mixed(_measured(footprints, sense), request, formats, bits_budget, sense)
        # one format that is the best for all may be there already
        found += [mixed] if all(mixed.quant != it.quant for it in found) else []
    within = [it for it in found if bits_budget is None or it.sizes.bits <= bits_budget]
    if not within:
        least = min(it.sizes.bits for it in found)
        raise UserError(
            f"--bits-budget {bits_budget}: the fewest bits that can be had are {least:.2f} a "
            "weight, scales included; raise it, or name other formats with --formats"
        )
    # what cannot be told from its loss comes last
    return sorted(within, key=lambda it: (math.isnan(it.lost), it.rank))


def best(found: Sequence[Candidate], request: Request) -> Candidate | None:
    """The one to take; None where nothing fits."""
    return next((candidate for candidate in found if candidate.fits(request)), None)


def undominated(found: Sequence[Candidate]) -> set[int]:
    """Places of those candidates, best first, that none with as small weights is as good as."""
    kept: set[int] = set()
    least: float = float("inf")
    for place, candidate in enumerate(found):
        if candidate.sizes.total_bytes < least:
            least = candidate.sizes.total_bytes
            kept.add(place)
    return kept


def _formats(
    footprint: Footprint, named: Sequence[FormatName] | None
) -> Iterator[FormatName | None]:
    """Those named; else those proposed that there are and that a model of that size bears."""
    if named is not None:
        yield from named
        return
    small = footprint.num_parameters < LEAST_FOR_LOW_BITS
    for name in PROPOSED:
        if name is None or (name in format_names() and not (small and load_format(name).bits < 3)):
            yield name


def _candidate(
    footprint: Footprint, quant: Quant, request: Request, sense: SenseFile | None
) -> Candidate:
    # 16 bits have no method, and lose nothing
    known = sense is not None and quant.format is not None
    measured = replace(_usual(sense), format=quant.format) if sense and known else None
    losses = _losses(measured, footprint, sense)
    if measured is not None and losses is not None:
        quant, lost = measured, sum(losses)
    else:
        bits = 16 if quant.format is None else load_format(quant.format).bits
        lost = expected_loss(quant, bits, footprint.num_parameters)
    need = footprint.need(quant, request)
    return Candidate(footprint, quant, footprint.sizes(quant), need, lost, losses is not None)


def _usual(sense: SenseFile) -> Quant:
    """The settings under which layers were measured."""
    return Quant(
        method=sense.header.method,  # type: ignore[arg-type]
        rotate=sense.header.rotate,
        group_size=sense.header.group_size,  # type: ignore[arg-type]
    )


def _losses(
    quant: Quant | None, footprint: Footprint, sense: SenseFile | None
) -> list[float] | None:
    """What each layer was measured to lose; None where that is not known of all of them."""
    if sense is None or quant is None or quant.format is None:
        return None
    shared = shared_losses(sense.found)
    names = [it.layer for it in sense.found if it.format == quant.format]
    # what overflowed when it was measured has a loss that is no number
    known = {name: shared.get((name, quant.format), math.nan) for name in names}
    layers = footprint.sizes(quant).layers
    return [known[it] for it in layers] if known.keys() == layers.keys() else None


def _measured(footprints: Sequence[Footprint], sense: SenseFile) -> Footprint:
    """The model that was measured; UserError where it is none of these."""
    layers = {it.layer for it in sense.found}
    alike = [it for it in footprints if layers == set(it.sizes(Quant(format=None)).layers)]
    named = [it for it in alike if it.name == sense.header.model]
    if not alike:
        raise UserError(
            f"{sense.path} measures layers of {sense.header.model}, which are not those of "
            f"{', '.join(it.name for it in footprints)}; run qtune sense on that model to its end"
        )
    return (named or alike)[0]


def _mixed(
    footprint: Footprint,
    request: Request,
    formats: Sequence[FormatName] | None,
    bits_budget: float | None,
    sense: SenseFile,
) -> Candidate:
    """The model with formats chosen layer by layer, as many bits as memory and budget allow."""
    usual = _usual(sense)
    options = _options(footprint, usual, formats, sense)
    budget = _budget(footprint, usual, request, bits_budget)
    chosen = allocate(options, max(budget, _least(options)))
    quant = _with_formats(usual, chosen.formats, footprint.sizes(usual))
    found = footprint.sizes(quant)
    return Candidate(
        footprint, quant, found, footprint.need(quant, request), chosen.loss, measured=True
    )


def _budget(footprint: Footprint, usual: Quant, request: Request, bits_budget: float | None) -> int:
    """Bytes for the quantized layers: what memory leaves for them, and what the budget allows."""
    found = footprint.sizes(usual)
    left = request.memory_bytes - footprint.need(usual, request).total + found.layer_bytes
    return left if bits_budget is None else min(left, int(bits_budget * found.layer_weights / 8))


def _options(
    footprint: Footprint, usual: Quant, formats: Sequence[FormatName] | None, sense: SenseFile
) -> dict[str, list[Option]]:
    """The measured formats of each layer, with the bytes that they take here."""
    options: dict[str, list[Option]] = defaultdict(list)
    for (layer, name), loss in shared_losses(sense.found).items():
        if formats is None or name in formats:
            own = footprint.sizes(replace(usual, format=name))  # type: ignore[arg-type]
            options[layer].append(Option(name, own.layers[layer][1], loss))
    return options


def _least(options: dict[str, list[Option]]) -> int:
    return sum(min(option.size_bytes for option in choices) for choices in options.values())


def _with_formats(usual: Quant, formats: dict[str, str], found: Sizes) -> Quant:
    """The form whose layers have these formats; that of most weights is the usual one."""
    weights: Counter[str] = Counter()
    for layer, name in formats.items():
        weights[name] += found.layers[layer][0]
    most = weights.most_common(1)[0][0]
    others = {layer: name for layer, name in formats.items() if name != most}
    return replace(usual, format=most, layers=others)  # type: ignore[arg-type]
