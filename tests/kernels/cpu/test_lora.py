"""A LoRA layer's products by AMX: forward and gradients against float64."""

import pytest
import torch
from samples import Sample, error, sample
from stored_samples import stored_sample
from torch import Tensor

from qtune_kernels.cpu import lora, tiles
from qtune_kernels.dequantize import Codes

pytestmark = pytest.mark.skipif(not tiles.available(), reason="no AMX")

# of the result and of the R-wide product between, each to bf16
ROUNDING = 2 * 2.0**-8
SCALING = 1.5


def layer(
    shape: tuple[int, int], rank: int, made: Sample | None = None
) -> tuple[Codes, Tensor, Tensor, Tensor]:
    """Codes, their weights in float64, and adapter matrices whose part is as large as theirs."""
    made = sample(shape) if made is None else made
    codes = Codes(made.packed, made.scales, made.levels, made.group_size, shape)
    a, b = torch.randn(rank, shape[1]) * 0.05, torch.randn(shape[0], rank) * 0.05
    return codes, made.weights.float().bfloat16().double(), a, b


@pytest.mark.parametrize("num_rows", [1, 33, 64])
@pytest.mark.parametrize("rank", [1, 8, 32])
@pytest.mark.parametrize("shape", [(96, 128), (160, 64)])
def test_forward_and_gradients(shape, rank, num_rows) -> None:
    check(*layer(shape, rank), num_rows)


@pytest.mark.parametrize(
    ("bits", "scales", "zeros"),
    [
        (4, torch.int8, torch.uint8),
        (3, torch.float16, torch.uint8),
        (2, torch.float32, torch.float16),
        (8, torch.int8, None),
    ],
)
def test_other_ways_of_storing(bits, scales, zeros) -> None:
    made = stored_sample((96, 128), bits, scales, zeros, 32)
    check(*layer((96, 128), 8, made), 33)


def check(codes: Codes, weight: Tensor, a: Tensor, b: Tensor, num_rows: int) -> None:
    """Compare a layer's results with float64."""
    outs, ins = codes.shape
    x, dy = torch.randn(num_rows, ins).bfloat16(), torch.randn(num_rows, outs).bfloat16()
    bias = torch.randn(outs).bfloat16()
    y, u = lora.forward(x, codes, bias, a, b, SCALING)
    x64, dy64, a64 = x.double(), dy.double(), a.double()
    b64 = SCALING * b.double()
    assert error(u, x64 @ a64.T) < ROUNDING
    assert error(y, x64 @ weight.T + x64 @ a64.T @ b64.T + bias.double()) < ROUNDING
    dx, da, db = lora.backward(dy, x, u, codes, a, b, SCALING, True)
    assert error(dx, dy64 @ weight + dy64 @ b64 @ a64) < ROUNDING
    assert error(da, (dy64 @ b64).T @ x64) < ROUNDING
    assert error(db, SCALING * dy64.T @ (x64 @ a64.T)) < ROUNDING
    assert (y.dtype, u.dtype, dx.dtype) == (torch.bfloat16,) * 3
    assert (da.dtype, db.dtype) == (torch.float32,) * 2


def test_a_gradient_nobody_needs_is_not_made() -> None:
    codes, _, a, b = layer((96, 128), 8)
    x, dy = torch.randn(32, 128).bfloat16(), torch.randn(32, 96).bfloat16()
    _, u = lora.forward(x, codes, None, a, b, SCALING)
    assert lora.backward(dy, x, u, codes, a, b, SCALING, False)[0].numel() == 0


def test_what_is_taken() -> None:
    codes, *_ = layer((96, 128), 8)
    x = torch.empty(4, 128, dtype=torch.bfloat16)
    assert lora.takes(x, codes, 32)
    assert not lora.takes(x, codes, 33)
    assert not lora.takes(x.half(), codes, 8)
