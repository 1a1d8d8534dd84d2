"""Narrow codes in bytes, as GGUF blocks hold them."""

import torch
from torch import Tensor


def planes(codes: Tensor, bits: int, run: int) -> Tensor:
    """Bytes, uint8 [N, M * bits / 8], of codes of `bits` bits, uint8 [N, M].

    `run` neighbours lie in as many neighbouring bytes, and the runs that share those bytes fill
    them from the lowest bits up.
    """
    fields = codes.reshape(len(codes), -1, 8 // bits, run)
    joined = fields[:, :, 0].clone()
    for place in range(1, 8 // bits):
        joined |= fields[:, :, place] << bits * place
    return joined.view(len(codes), -1)


def eight_pairs(scales: Tensor, minima: Tensor) -> Tensor:
    """Bytes, uint8 [N, 12], of eight scales and eight minima of 6 bits, uint8 [N, 8] each.

    The first four of each have bytes of their own, whose two upper bits are the upper ones of the
    last four; their lower halves share the last bytes.
    """
    first = [part[:, :4] | (part[:, 4:] >> 4) << 6 for part in (scales, minima)]
    return torch.cat([*first, scales[:, 4:] & 15 | minima[:, 4:] << 4], -1)


def sixteen(scales: Tensor) -> Tensor:
    """Bytes, uint8 [N, 12], of sixteen numbers of 6 bits, uint8 [N, 16]: low halves, then rest."""
    return torch.cat([planes(scales & 15, 4, 8), planes(scales >> 4, 2, 4)], -1)


def half(values: Tensor) -> Tensor:
    """Bytes, uint8 [N, 2], of values [N] as 16-bit floats."""
    return values.half().unsqueeze(-1).view(torch.uint8)
