"""The bytes of a block, type by type, as ggml reads them (`block_q4_K` and its like).

Each function takes the fields of N blocks and gives uint8 [N, type_size].
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from qtune.quant.kquants.bits import eight_pairs, half, planes, sixteen
from qtune.quant.kquants.descent import Block
from qtune.quant.kquants.kinds import KINDS


class Fields(NamedTuple):
    """What the bytes of N blocks hold; S groups of G weights in each."""

    codes: Tensor
    """Of levels, uint8 [N, S * G]."""
    scales: Tensor
    """Whole numbers, int16 [N, S]."""
    step: Tensor
    """Of scales, 16-bit floats as uint8 [N, 2]."""
    minima: Tensor
    """Whole numbers, uint8 [N, S]; of types without minima [N, 0]."""
    least: Tensor
    """The step of minima, as `step`."""


def packed(block: Block, kind: str) -> Tensor:
    """Bytes, uint8 [N, type_size], of N blocks of a type."""
    codes = KINDS[kind].levels.codes(block.levels).flatten(0, 1).T.contiguous()
    scales, step = block.scales.counts.T.to(torch.int16), half(block.scales.step)
    if block.minima is None:
        return LAYOUTS[kind](Fields(codes, scales, step, codes[:, :0], step[:, :0]))
    # a minimum that is a float of its own is added, the others are taken off
    sign = -1 if KINDS[kind].groups == 1 else 1
    minima, least = block.minima.counts.T.to(torch.uint8), half(sign * block.minima.step)
    return LAYOUTS[kind](Fields(codes, scales, step, minima, least))


def _q8_0(fields: Fields) -> Tensor:
    # codes count from the first level; modulo 256 this is two's complement
    return _joined(fields.step, fields.codes - 127)


def _q4(fields: Fields) -> Tensor:
    return _joined(fields.step, fields.least, planes(fields.codes, 4, 16))


def _q5(fields: Fields) -> Tensor:
    high, low = planes(fields.codes >> 4, 1, 1), planes(fields.codes & 15, 4, 16)
    return _joined(fields.step, fields.least, high, low)


def _q2_k(fields: Fields) -> Tensor:
    counts = fields.scales.to(torch.uint8) | fields.minima << 4
    return _joined(counts, planes(fields.codes, 2, 32), fields.step, fields.least)


def _q3_k(fields: Fields) -> Tensor:
    high, low = planes(fields.codes >> 2, 1, 32), planes(fields.codes & 3, 2, 32)
    return _joined(high, low, sixteen((fields.scales + 32).to(torch.uint8)), fields.step)


def _q4_k(fields: Fields) -> Tensor:
    counts = eight_pairs(fields.scales.to(torch.uint8), fields.minima)
    return _joined(fields.step, fields.least, counts, planes(fields.codes, 4, 32))


def _q5_k(fields: Fields) -> Tensor:
    counts = eight_pairs(fields.scales.to(torch.uint8), fields.minima)
    high, low = planes(fields.codes >> 4, 1, 32), planes(fields.codes & 15, 4, 32)
    return _joined(fields.step, fields.least, counts, high, low)


def _q6_k(fields: Fields) -> Tensor:
    low, high = planes(fields.codes & 15, 4, 64), planes(fields.codes >> 4, 2, 32)
    return _joined(low, high, fields.scales.to(torch.int8).view(torch.uint8), fields.step)


def _joined(*parts: Tensor) -> Tensor:
    return torch.cat(parts, -1)


LAYOUTS: dict[str, Callable[[Fields], Tensor]] = {
    "Q8_0": _q8_0,
    "Q5_0": _q5,
    "Q4_0": _q4,
    "IQ4_NL": _q4,
    "Q5_1": _q5,
    "Q4_1": _q4,
    "Q6_K": _q6_k,
    "Q5_K": _q5_k,
    "Q4_K": _q4_k,
    "Q3_K": _q3_k,
    "Q2_K": _q2_k,
}
