"""Hadamard matrices for the widths of real models, and the signs that make them random.

A matrix of order n is a Kronecker product: Paley's constructions for the odd part of n, each of
order 4m or 8m with m odd, and Sylvester's for the power of two that is left. Where the odd part
has no such matrix, blocks of the largest power of two that divides n stand on the diagonal.

Rotated weights are stored, so what these functions return for an n may never change; nothing here
depends on a random number generator. Williamson's matrices are left out: the width that is known
for needing one (172 in Llama-2's 11008) has a Paley matrix of order 344, over a field of 7^3.
"""

import math
from functools import cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

# wider dense factors would cost as much as the products they prepare
LARGEST_ORDER = 512
_WORD = 0xFFFFFFFF
_SYLVESTER = ((1, 1), (1, -1))


class Orders(NamedTuple):
    """How n numbers are transformed: in `num_blocks`, each by the product of small matrices."""

    num_blocks: int
    factors: tuple[int, ...]


def signs(num: int, seed: int = 0) -> Tensor:
    """1 or -1 for each index, float32 [num], from a fixed hash of index and seed."""
    # a mixer of 32 bits with full avalanche, by Chris Wellons
    word = (torch.arange(num, device="cpu") + (seed << 24)) & _WORD
    word = ((word ^ (word >> 16)) * 0x7FEB352D) & _WORD
    word = ((word ^ (word >> 15)) * 0x846CA68B) & _WORD
    return 1.0 - 2.0 * ((word ^ (word >> 16)) & 1).float()


@cache
def orders(n: int) -> Orders:
    """The orders whose Kronecker product, outermost first, transforms each block of n numbers."""
    twos = (n & -n).bit_length() - 1
    num_blocks, factors = 1, _paley_orders(n >> twos, twos)
    if factors is None:
        num_blocks, factors = n >> twos, ()
    rest = n // num_blocks // math.prod(factors)
    return Orders(num_blocks, factors + (2,) * (rest.bit_length() - 1))


def kronecker(factors: tuple[int, ...]) -> Tensor:
    """The product of Hadamard matrices of these orders, int64 of 1 and -1, on the CPU."""
    # whoever asks may be making tensors on another device
    with torch.device("cpu"):
        made = torch.tensor([[1]])
        for order in factors:
            made = torch.kron(made, torch.tensor(_SYLVESTER) if order == 2 else paley(order))
    return made


@cache
def _paley_orders(odd: int, twos: int) -> tuple[int, ...] | None:
    """Paley orders that use up an odd number and at most 2^twos, with the least sum, or None."""
    if odd == 1:
        return ()
    found = []
    parts = [part for part in range(3, odd + 1, 2) if odd % part == 0]
    for part, power in product(parts, range(2, min(3, twos) + 1)):
        rest = _paley_orders(odd // part, twos - power) if _field_of(part << power) else None
        if rest is not None:
            found.append(tuple(sorted((part << power, *rest))))
    return min(found, key=lambda orders: (sum(orders), orders), default=None)


def paley(order: int) -> Tensor:
    """Paley's Hadamard matrix of an order that has one, int64 [order, order]."""
    size = _field_of(order)
    symmetric = size % 4 == 1
    conference = torch.zeros(size + 1, size + 1, dtype=torch.long)
    conference[0, 1:], conference[1:, 0] = 1, 1 if symmetric else -1
    conference[1:, 1:] = _residues_of_differences(size)
    unit = torch.eye(size + 1, dtype=torch.long)
    if not symmetric:
        return conference + unit
    first, second = torch.tensor(_SYLVESTER), torch.tensor([[1, -1], [-1, -1]])
    return torch.kron(conference, first) + torch.kron(unit, second)


def _field_of(order: int) -> int:
    """The size of the field for Paley's first or second construction of that order, or 0."""
    if order > LARGEST_ORDER:
        return 0
    if (order - 1) % 4 == 3 and _prime_power(order - 1):
        return order - 1
    half = order // 2 - 1
    return half if half % 4 == 1 and _prime_power(half) else 0


@cache
def _prime_power(size: int) -> tuple[int, int] | None:
    """(p, k) with p^k = size, p prime and k at most 3, or None."""
    prime = next((p for p in range(2, size + 1) if size % p == 0), 0)
    return next(((prime, k) for k in (1, 2, 3) if prime and prime**k == size), None)


def _residues_of_differences(size: int) -> Tensor:
    """int64 [size, size]: 1 where the difference of two elements is a square, 0 where none, or -1.

    The field's elements are polynomials over the integers modulo p, numbered by coefficients.
    """
    found = _prime_power(size)
    assert found is not None
    p, k = found
    places = p ** torch.arange(k)
    elements = torch.arange(size)[:, None] // places % p  # [size, k], lowest power first
    residues = torch.full((size,), -1)
    residues[(_squares(elements, p) * places).sum(1)] = 1
    residues[0] = 0
    differences = (elements[:, None] - elements[None]) % p
    return residues[(differences * places).sum(2)]


def _squares(elements: Tensor, p: int) -> Tensor:
    """Each element [size, k] times itself."""
    k = elements.shape[1]
    squares = torch.zeros(len(elements), 2 * k - 1, dtype=torch.long)
    for left, right in product(range(k), repeat=2):
        squares[:, left + right] += elements[:, left] * elements[:, right]
    lower = torch.tensor(_irreducible(p, k))
    for power in range(2 * k - 2, k - 1, -1):
        # x^k is minus what follows it in the polynomial that is zero
        squares[:, power - k : power] -= squares[:, power : power + 1] * lower
    return squares[:, :k] % p


def _irreducible(p: int, k: int) -> tuple[int, ...]:
    """The lower coefficients of the first monic polynomial of degree k <= 3 without a root."""
    if k == 1:
        return (0,)
    for lower in product(range(p), repeat=k):
        values = [(x**k + sum(c * x**i for i, c in enumerate(lower))) % p for x in range(p)]
        if 0 not in values:
            return lower
    raise AssertionError("there is one of every degree")
