"""The code book E8P: 65,536 points near the origin of a lattice in eight dimensions.

QuIP#, arXiv 2402.04396, section 4. A word of 16 bits stands for eight numbers. Its low byte is one
of 256 patterns of magnitudes 1/2, 3/2 and 5/2: all those with squared norm 10 or less, and 29 of
norm 12. The next seven bits are the signs of the first seven numbers; that of the last makes their
sum even. The highest bit says whether a quarter is then added to all of them or taken off.

The nearest point is found through its pattern, which is nearest to the magnitudes: two products
with all patterns. Where the signs then sum up to an odd number, one of them is turned, which costs
least for the smallest number; so its magnitude is negative in the product with patterns of that
parity. That is exact for the ball, where a pattern may be reordered until the smallest number has a
magnitude of 1/2. The 29 patterns, which may not, are looked at again where they could win.
"""

from functools import cache
from itertools import combinations, product
from typing import NamedTuple

import torch
from torch import Tensor

LENGTH = 8
# what decoded numbers are multiples of
STEP = 0.25
_SHIFTS = (0.25, -0.25)
_OUTER = 29
# vectors done at a time: on the CPU their costs stay in the cache
_CHUNK = {"cpu": 1 << 10}
_LARGE_CHUNK = 1 << 17


def nearest_words(vectors: Tensor) -> Tensor:
    """The words, int32 [N], of the points nearest to float32 vectors [N, 8]."""
    if vectors.is_meta or not len(vectors):
        return vectors.new_empty(len(vectors), dtype=torch.int32)
    chunk = _CHUNK.get(vectors.device.type, _LARGE_CHUNK)
    return torch.cat([_nearest(part) for part in vectors.split(chunk)])


def decode_words(words: Tensor) -> Tensor:
    """Multiples of `STEP`, int8 [N, 8], for which words int32 [N] stand."""
    return points(words.device)[words].view(torch.int8).view(-1, LENGTH)


@cache
def points(device: torch.device) -> Tensor:
    """All points by their words, [65536]: an int64 is eight int8, see `decode_words`."""
    word = torch.arange(1 << 16, device="cpu")
    digits = _patterns()[word & 0xFF]  # [65536, 8]
    place = torch.arange(LENGTH, device="cpu")
    signs = (word[:, None] >> 8 & 0x7F) >> place & 1
    signs[:, 7] = (digits.sum(1) + signs.sum(1)) % 2
    shift = 1 - 2 * (word >> 15)
    found = (1 - 2 * signs) * (4 * digits + 2) + shift[:, None]
    return found.to(torch.int8).view(torch.int64).view(-1).to(device)


@cache
def pattern_words(device: torch.device) -> Tensor:
    """Patterns for kernels, int32 [256]: magnitudes in steps, 4 bits each, lowest first.

    Magnitudes are even numbers of steps, and the lowest bit says whether their sum is odd.
    """
    digits = _patterns()
    place = torch.arange(LENGTH, device="cpu")
    fields = ((4 * digits + 2) << 4 * place).sum(1) + digits.sum(1) % 2
    return fields.to(torch.uint32).view(torch.int32).to(device)


@cache
def _patterns() -> Tensor:
    """Magnitudes less 1/2, int64 [256, 8], by number: those with an even sum, then the others."""
    ball = [p for p in product(range(3), repeat=LENGTH) if sum((d + 0.5) ** 2 for d in p) <= 10]
    ball.sort(key=lambda digits: sum(digits) % 2)
    return torch.tensor(ball + _outer_patterns(), device="cpu")


def _outer_patterns() -> list[tuple[int, ...]]:
    """29 of the 56 with five magnitudes 3/2: places of the others with an even sum, and one more.

    No coordinate is much favoured by that.
    """
    smaller = sorted(combinations(range(LENGTH), 3), key=lambda places: (sum(places) % 2, places))
    return [tuple(int(i not in places) for i in range(LENGTH)) for places in smaller[:_OUTER]]


class _Magnitudes(NamedTuple):
    """Patterns whose sum has one parity: float32 [8, K], and their squared norms [K]."""

    columns: Tensor
    norms: Tensor

    def costs(self, sizes: Tensor) -> Tensor:
        """Squared norms less twice the products with float32 [N, 8]: [N, K]."""
        return torch.addmm(self.norms, sizes, self.columns, alpha=-2)


@cache
def _magnitudes(device: torch.device) -> tuple[_Magnitudes, _Magnitudes, _Magnitudes]:
    """The patterns with an even sum, those with an odd one, and the outer ones among these."""
    patterns = _patterns()
    num_even = int((patterns.sum(1) % 2 == 0).sum())
    columns = (patterns.float() + 0.5).T.to(device)
    parts = columns[:, :num_even], columns[:, num_even:], columns[:, -_OUTER:]
    even, odd, outer = (_Magnitudes(part.contiguous(), part.square().sum(0)) for part in parts)
    return even, odd, outer


def _nearest(vectors: Tensor) -> Tensor:
    """The words of at most a chunk of vectors."""
    shifted = torch.cat([vectors - shift for shift in _SHIFTS])  # [2 N, 8]
    sizes, negative = shifted.abs(), shifted < 0
    odd = negative.sum(1) % 2 == 1
    costs, pattern, turned = _best_patterns(sizes, odd)
    # what all points of a shift have in common
    costs += sizes.square().sum(1)
    half = len(vectors)
    second = costs[half:] < costs[:half]
    at = torch.arange(half, device=vectors.device) + half * second
    place = torch.arange(LENGTH, dtype=torch.int32, device=vectors.device)
    signs = (negative[at].int() << place).sum(1, dtype=torch.int32) ^ (1 << turned[at])
    return (pattern[at] | (signs & 0x7F) << 8 | second.int() << 15).int()


def _best_patterns(sizes: Tensor, odd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of magnitudes [N, 8]: least costs, patterns, and places of the sign to turn, 8 for none.

    `odd` [N] says whether the number of minus signs is.
    """
    even_patterns, odd_patterns, outer_patterns = _magnitudes(sizes.device)
    least, smallest = sizes.min(1)
    turned = sizes.scatter(1, smallest[:, None], -least[:, None])
    is_odd = odd[:, None]
    even_costs, even = even_patterns.costs(torch.where(is_odd, turned, sizes)).min(1)
    odd_costs, uneven = odd_patterns.costs(torch.where(is_odd, sizes, turned)).min(1)
    uneven += len(even_patterns.norms)
    takes_odd = odd_costs < even_costs
    costs, pattern = torch.minimum(even_costs, odd_costs), torch.where(takes_odd, uneven, even)
    place = torch.where(takes_odd != odd, smallest, LENGTH)
    bound = outer_patterns.costs(sizes).amin(1) + 2 * least
    again = (~odd & (bound < costs)).nonzero()[:, 0]
    if len(again):
        others = _outer(sizes[again], outer_patterns)
        better = others[0] < costs[again]
        for known, other in zip((costs, pattern, place), others, strict=True):
            known[again] = torch.where(better, other, known[again])
    return costs, pattern, place


def _outer(sizes: Tensor, patterns: _Magnitudes) -> tuple[Tensor, Tensor, Tensor]:
    """As above for the outer patterns, where a sign must be turned."""
    turned_costs, turned = (sizes.unsqueeze(2) * patterns.columns).min(1)
    costs, chosen = (patterns.costs(sizes) + 4 * turned_costs).min(1)
    place = turned.gather(1, chosen[:, None])[:, 0]
    return costs, chosen + len(_patterns()) - _OUTER, place
