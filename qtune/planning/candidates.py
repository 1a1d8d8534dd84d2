"""Forms of models that could be trained or used in some memory, and which of them is the best.

A form is a number format with the method that suits it. What each takes is counted (`footprint`);
what it loses is looked up (`expected_loss`), or is what `qtune sense` has measured of the model.
With measurements the formats are also chosen layer by layer (`mixture`), for as many bytes as there
are.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qtune.errors import UserError
from qtune.planning.expected_loss import LEAST_FOR_LOW_BITS, expected_loss, gain_of_size
from qtune.planning.footprint import Footprint, Need, Request
from qtune.planning.mixture import Measurements
from qtune.planning.sizes import Sizes
from qtune.progress import bar
from qtune.quant.format import format_names, load_format
from qtune.recipe import FormatName, Quant
from qtune.sensing.sensitivity import SenseFile

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
    measured = None if sense is None else Measurements(sense)
    found = []
    with bar("forms", len(wanted)) as progress:
        for footprint, quant in wanted:
            found.append(_candidate(footprint, quant, request, measured))
            progress.advance(words=footprint.label)
    if measured is not None:
        mixed = _mixed(footprints, request, formats, bits_budget, measured)
        # one format that is the best for all may be there already
        if mixed is not None and all(mixed.quant != it.quant for it in found):
            found.append(mixed)
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
    footprint: Footprint, quant: Quant, request: Request, measured: Measurements | None
) -> Candidate:
    lost = None
    # 16 bits have no method, and lose nothing
    if measured is not None and quant.format is not None:
        lost = measured.lost(footprint, quant.format)
        quant = quant if lost is None else measured.form(quant.format)
    if lost is None:
        bits = 16 if quant.format is None else load_format(quant.format).bits
        expected = expected_loss(quant, bits, footprint.num_parameters)
        return _in_form(footprint, quant, request, expected, measured=False)
    return _in_form(footprint, quant, request, lost, measured=True)


def _mixed(
    footprints: Sequence[Footprint],
    request: Request,
    formats: Sequence[FormatName] | None,
    bits_budget: float | None,
    measured: Measurements,
) -> Candidate | None:
    """The measured model with formats chosen layer by layer."""
    footprint = measured.model_among(footprints)
    found = measured.mixture(footprint, request, formats, bits_budget)
    return None if found is None else _in_form(footprint, found[0], request, found[1], True)


def _in_form(
    footprint: Footprint, quant: Quant, request: Request, lost: float, measured: bool
) -> Candidate:
    need = footprint.need(quant, request)
    return Candidate(footprint, quant, footprint.sizes(quant), need, lost, measured)
