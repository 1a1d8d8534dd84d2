"""Bytes of blocks with numbers drawn at random, against what `gguf` reads from them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qtune.quant.kquants.descent import Block, Part
from qtune.quant.kquants.kinds import KINDS, Kind
from qtune.quant.kquants.layout import packed
from qtune.quant.kquants.levels import Integers

BLOCKS = 64


def whole(numbers: Integers, *shape: int) -> Tensor:
    return torch.randint(numbers.low, numbers.high + 1, shape).float()


def block_of(kind: Kind) -> Block:
    """Blocks with any levels, whole numbers and steps that the type can hold."""
    torch.manual_seed(0)
    shape = kind.groups, kind.size, BLOCKS
    if isinstance(kind.levels, Integers):
        levels = whole(kind.levels, *shape)
    else:
        values = torch.tensor(kind.levels.values).float()
        levels = values[torch.randint(len(values), shape)]
    scales = Part(whole(kind.steps, kind.groups, BLOCKS), torch.randn(BLOCKS).half().float())
    if kind.minima is None:
        return Block(levels, scales, None)
    counts = whole(kind.minima, kind.groups, BLOCKS)
    return Block(levels, scales, Part(counts, torch.randn(BLOCKS).half().float()))


def weights_of(block: Block) -> Tensor:
    """d s q - e m, rounded to float32 after each operation: [N, S * G]."""
    weights = (block.scales.step * block.scales.counts).unsqueeze(1) * block.levels
    if block.minima is not None:
        weights = weights - (block.minima.step * block.minima.counts).unsqueeze(1)
    return weights.flatten(0, 1).T


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_mean_the_numbers_of_the_block(kind: str, decode: Callable[..., Tensor]) -> None:
    block = block_of(KINDS[kind])
    encoded = packed(block, kind)
    assert encoded.shape == (BLOCKS, KINDS[kind].type_size)
    assert torch.equal(decode(encoded, kind), weights_of(block))
