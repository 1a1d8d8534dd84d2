"""What fits into some memory: the best form of a model, how much more of it would, and what would
have to change for a better form to fit.

Changes are tried from the cheapest on: 8-bit keys and values cost next to nothing, fewer rows at a
time cost speed, 4-bit ones some quality, and a shorter context is another task.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from qtune.errors import UserError
from qtune.fitting import largest_below
from qtune.planning.candidates import Candidate, best, candidates
from qtune.planning.footprint import Footprint, Request
from qtune.recipe import FormatName
from qtune.sensing.sensitivity import SenseFile

# tokens of a context that a few more or less do not matter
CONTEXT_STEP = 128
# rows at a time that are looked at
MOST_ROWS = 512


@dataclass(frozen=True)
class Change:
    """Another request, and in words what is other."""

    words: str
    request: Request


@dataclass(frozen=True)
class Wish:
    """A better form that does not fit, and the cheapest change with which it would."""

    candidate: Candidate
    change: Change


@dataclass(frozen=True)
class Budget:
    """The forms there are, best first; the one to take, and by how much it could grow."""

    request: Request
    candidates: list[Candidate]
    chosen: Candidate
    most_rows: int
    """Rows of the context at a time that would fit, MOST_ROWS at most."""
    most_context: int
    """Tokens of a context that would fit with the rows requested."""
    wish: Wish | None
    """The best form that would fit if one thing were other."""


def find(
    footprints: Sequence[Footprint],
    request: Request,
    formats: Sequence[FormatName] | None = None,
    bits_budget: float | None = None,
    sense: SenseFile | None = None,
) -> Budget:
    """What to take for the request.

    Raises UserError where nothing fits, with the least memory that would do, and as `candidates`
    does.
    """
    found = candidates(footprints, request, formats, bits_budget, sense)
    chosen = best(found, request)
    if chosen is None:
        raise UserError(_nothing_fits(found, request))
    return Budget(
        request=request,
        candidates=found,
        chosen=chosen,
        most_rows=most_rows(chosen, request),
        most_context=most_context(chosen, request),
        wish=_wish(found[: found.index(chosen)], request),
    )


def most_rows(candidate: Candidate, request: Request) -> int:
    """Rows at a time that fit, MOST_ROWS at most; 0 where one does not."""

    def size_at(rows: int) -> int:
        return _size(candidate, replace(request, batch=rows))

    return _largest(size_at, 1, MOST_ROWS, request.memory_bytes, 1)


def most_context(candidate: Candidate, request: Request) -> int:
    """Tokens of a context that fit, up to what the model was made for; 0 where few do not."""

    def size_at(tokens: int) -> int:
        return _size(candidate, replace(request, context=tokens))

    most = max(CONTEXT_STEP, candidate.footprint.most_context)
    return _largest(size_at, CONTEXT_STEP, most, request.memory_bytes, CONTEXT_STEP)


def cheapest_change(candidate: Candidate, request: Request) -> Change | None:
    """The first change with which the form fits; None where no single one is enough."""
    for change in _changes(candidate, request):
        if _size(candidate, change.request) <= request.memory_bytes:
            return change
    return None


def _wish(better: Sequence[Candidate], request: Request) -> Wish | None:
    for candidate in better:
        # no change makes weights smaller
        if candidate.sizes.total_bytes < request.memory_bytes:
            change = cheapest_change(candidate, request)
            # a much shorter context is another task
            if change is not None and 2 * change.request.context >= request.context:
                return Wish(candidate, change)
    return None


def _changes(candidate: Candidate, request: Request) -> Iterator[Change]:
    if request.serve and request.kv_bits > 8:
        yield Change("--kv-bits 8", replace(request, kv_bits=8))
    if not request.serve and request.optimizer == "adamw":
        words = "train.optimizer: adamw_8bit"
        yield Change(words, replace(request, optimizer="adamw_8bit"))
    rows = most_rows(candidate, request)
    if 0 < rows < request.batch:
        yield Change(f"--batch {rows}", replace(request, batch=rows))
    if request.serve and request.kv_bits > 4:
        yield Change("--kv-bits 4", replace(request, kv_bits=4))
    tokens = most_context(candidate, request)
    if 0 < tokens < request.context:
        yield Change(f"--context {tokens}", replace(request, context=tokens))


def _largest(size_at: Callable[[int], int], least: int, most: int, free: int, step: int) -> int:
    if size_at(least) > free:
        return 0
    if size_at(most) <= free:
        return most
    return largest_below(size_at, least, most, free, step) or 0


def _size(candidate: Candidate, request: Request) -> int:
    # in no memory at all it is the least that will do
    return candidate.footprint.need(candidate.quant, replace(request, memory_bytes=0)).total


def _nothing_fits(found: Sequence[Candidate], request: Request) -> str:
    """The least that would do, for what is requested and for one row of it."""
    smallest = min(found, key=lambda it: it.need.total)
    change = cheapest_change(smallest, request)
    advice = f"{change.words} would fit; " if change else ""
    return (
        f"--memory: {_gib(request.memory_bytes)} hold none of these models for {request.batch} x "
        f"{request.context} tokens; the least is {_gib(smallest.need.total)}, for "
        f"{smallest.footprint.label} as {smallest.name}; {advice}name a smaller model, fewer bits "
        "or more memory"
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
