"""Keys and values as factors of products, and sums of gradients on their way out."""

import pytest
import torch
from samples import error
from torch import Tensor

from qtune_kernels.cpu import attention_tiles as parts
from qtune_kernels.cpu import tiles
from qtune_kernels.cpu.attention_keys import Keys
from qtune_kernels.cpu.jit import Integer, KernelCode, Number, Pointer, kernel
from qtune_kernels.cpu.simd import F32

pytestmark = pytest.mark.skipif(not tiles.available(), reason="this processor has no AMX")

WIDTH, LENGTH, BLOCKS = 64, 41, 2


@kernel
def _products(
    code: KernelCode,
    out: Pointer,
    left: Pointer,
    weights: Pointer,
    k: Pointer,
    v: Pointer,
    length: Integer,
    scratch: Pointer,
) -> None:
    """left k^T, left v^T and, [32, 32] for each 32 columns, weights k of each block."""
    keys = Keys(code, parts.Arena(scratch), code.integer(BLOCKS), WIDTH)
    stride = code.integer(2 * WIDTH)
    sample = parts.Sample(code, code.integer(0), length)
    matrices = [parts.Matrix(start, stride, stride) for start in (k, v)]
    tiles.configure(code)
    with code.loop(BLOCKS) as block:
        keys.take(block, *(sample.rows(m, block, code.integer(0)) for m in matrices))
    with code.loop(BLOCKS) as block:
        target = out + block * (4 * parts.SCORES_BYTES)
        for place, right in enumerate((keys.scoring(block), keys.valuing(block))):
            parts.score(code, left, right, target + place * parts.SCORES_BYTES, WIDTH)
        for column in range(WIDTH // 32):
            tiles.clear(code)
            right = keys.paired(block, code.integer(column))
            parts.multiply_add(code, weights, tiles.ROW_BYTES, right, tiles.TILE_BYTES)
            at = target + (2 + column) * parts.SCORES_BYTES
            tiles.move_sums(code, tiles.store, at, parts.SCORES_ROW)
    tiles.release(code)


@kernel
def _write(
    code: KernelCode,
    dk: Pointer,
    dv: Pointer,
    sums: Pointer,
    height: Integer,
    factor: Number,
    scratch: Pointer,
    *,
    wide: bool,
) -> None:
    """Copy `sums`, [2, D / 32, 32, 32], to the second block's place and write it."""
    keys = Keys(code, parts.Arena(scratch), code.integer(BLOCKS), WIDTH)
    block, stride = code.integer(1), code.integer((4 if wide else 2) * WIDTH)
    for number in range(2):
        for column in range(WIDTH // 32):
            place = keys.sums(number, block, code.integer(column))
            source = sums + (number * (WIDTH // 32) + column) * parts.SCORES_BYTES
            with code.loop(parts.SCORES_BYTES, 0, tiles.ROW_BYTES) as at:
                code.write(code.read(source + at, F32), place + at, F32)
    for number, target in enumerate((dk, dv)):
        rows = parts.Rows(target, stride, height)
        keys.write(number, block, factor, rows, wide=wide)


def scratch() -> Tensor:
    """As much as `Keys` takes, full of NaN."""
    size = parts.rows_bytes(WIDTH)
    return torch.full((BLOCKS * 7 * size + 3 * size,), 0xFF, dtype=torch.uint8)


def test_each_arrangement_serves_its_product() -> None:
    left, weights = torch.randn(32, WIDTH).bfloat16(), torch.randn(32, 32).bfloat16()
    k, v = (torch.randn(LENGTH, WIDTH).bfloat16() for _ in range(2))
    found, memory = torch.full((BLOCKS, 4, 32, 32), torch.nan), scratch()
    inputs = [tensor.data_ptr() for tensor in (left, weights, k, v)]
    _products(found.data_ptr(), *inputs, LENGTH, memory.data_ptr())
    for block, (keys, values) in enumerate(zip(k.split(32), v.split(32), strict=True)):
        keys, values = (torch.nn.functional.pad(x, (0, 0, 0, 32 - len(x))) for x in (keys, values))
        scores, gradients, *dq = found[block]
        assert error(scores, left.double() @ keys.double().T) < 1e-6
        assert error(gradients, left.double() @ values.double().T) < 1e-6
        assert error(torch.cat(dq, 1), weights.double() @ keys.double()) < 1e-6


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("height", [1, 9, 32])
def test_gradients_are_turned_scaled_and_cut(height: int, wide: bool) -> None:
    sums, memory = torch.randn(2, WIDTH // 32, 32, 32), scratch()
    out = torch.full((2, 33, WIDTH), torch.nan, dtype=torch.float32 if wide else torch.bfloat16)
    targets = [part.data_ptr() for part in out]
    _write(*targets, sums.data_ptr(), height, 0.3, memory.data_ptr(), wide=wide)
    # dk^T [D, 32]
    right = (sums.view(2, WIDTH, 32) * torch.tensor(0.3)).transpose(1, 2).to(out.dtype)
    assert torch.equal(out[:, :height], right[:, :height])
    assert out[:, height:].isnan().all()
