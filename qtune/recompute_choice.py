"""Which policy of recomputation a run takes: as little of it as the memory allows.

Recomputation costs time and saves memory, and changes no number. So this may be decided by what is
free when the run begins, and even anew where a run goes on with less memory than it began with.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from qtune.train.recompute import Policy

# share of the free memory that may be needed: allocators leave gaps, matrix libraries take work
# space
FILLED = 0.9


@dataclass(frozen=True)
class Recompute:
    """What the backward pass of a run makes again, and why."""

    policy: Policy
    reason: str
    total_bytes: dict[Policy, int]
    """What the run needs under each policy that the model can follow."""

    @property
    def saves_most(self) -> bool:
        """Whether no other policy needs less."""
        return self.total_bytes[self.policy] == min(self.total_bytes.values())


def choose(
    total_bytes: Mapping[Policy, int], free: int, wanted: str, begun: Policy | None
) -> Recompute:
    """The policy that the recipe wants; for `auto` the first that fits, or else the last.

    `total_bytes` says what the run needs, fastest policy first. A run that has begun with one keeps
    it where it fits at all.
    """
    sizes = dict(total_bytes)
    if wanted != "auto":
        (named,) = (policy for policy in sizes if policy == wanted)
        return Recompute(named, "the recipe names it", sizes)
    if begun is not None and sizes[begun] <= free:
        return Recompute(begun, "the run has begun with it", sizes)
    fits = [policy for policy, size in sizes.items() if size <= FILLED * free]
    policy = fits[0] if fits else list(sizes)[-1]
    return Recompute(policy, _reason(policy, sizes, free), sizes)


def _reason(policy: Policy, sizes: dict[Policy, int], free: int) -> str:
    faster = list(sizes)[: list(sizes).index(policy)]
    if not faster:
        return "everything fits" if len(sizes) > 1 else "the model knows no other"
    needed, there = sizes[faster[-1]] / 2**30, free / 2**30
    return f"{faster[-1]} would fill {needed:.1f} of {there:.1f} GiB"
