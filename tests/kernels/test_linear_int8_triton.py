"""The kernels of INT8 activations against float64, odd sizes, guarded and poisoned buffers."""

from collections.abc import Iterator

import pytest
import torch
from int8_samples import activations, decoded
from samples import Sample, error, sample
from torch import Tensor

from qtune_kernels.quantize_rows import QuantizedRows, quantize_rows
from qtune_kernels.scales import Scales, dynamic_map

kernels = pytest.importorskip("qtune_kernels.linear_int8_triton")

DTYPES = [torch.bfloat16, torch.float16]
# groups of a step of 64, of 128, across the ends of rows, of a row, of two rows
LAYOUTS = [((45, 192), 64), ((33, 256), 128), ((7, 192), 128), ((21, 320), 320), ((9, 128), 256)]
THRESHOLDS = pytest.mark.parametrize("threshold", [6.0, 0.0], ids=["outliers", "none"])
GUARD = 256


@pytest.fixture(autouse=True)
def poisoned_buffers() -> Iterator[None]:
    """Every new buffer starts as NaN, or its integer's largest, so that gaps show."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def guarded(values: Tensor, guard: float) -> Tensor:
    """The values between guards, so that a read beyond them shows."""
    around = values.new_full((values.numel() + 2 * GUARD,), guard)
    return around[GUARD:-GUARD].view(values.shape).copy_(values)


def inputs(num_rows: int, width: int, dtype: torch.dtype, num_outliers: int = 3) -> Tensor:
    """Activations between NaN."""
    return guarded(activations(num_rows, width, dtype=dtype, num_outliers=num_outliers), torch.nan)


def rows_in_8_bits(x: Tensor, threshold: float) -> QuantizedRows:
    return QuantizedRows(*quantize_rows(x, threshold))


def forward(made: Sample, x: Tensor, threshold: float, bias: Tensor | None = None) -> Tensor:
    quantized = rows_in_8_bits(x, threshold)
    weight = (made.packed, made.scales, made.group_size, made.weights.shape[0])
    return kernels.linear(x, quantized, *weight, bias, threshold > 0)


@THRESHOLDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "group_size"), LAYOUTS)
def test_outputs_are_those_of_exact_arithmetic(shape, group_size, dtype, threshold, device) -> None:
    made = sample(shape, (), group_size).to(device)
    made = made._replace(packed=guarded(made.packed, 255))
    x = inputs(19, shape[1], dtype).to(device)
    truth = decoded(x, threshold) @ made.weights.T
    bias = torch.randn(shape[0], device=device).to(dtype)
    # weights of outlier columns are rounded to 16 bits, as is the result
    limit = 2 * error(truth.to(dtype), truth)
    assert error(forward(made, x, threshold), truth) <= limit
    assert error(forward(made, x, threshold, bias), truth + bias.double()) <= limit


@pytest.mark.parametrize("num_rows", [1, 16, 65])
def test_every_tile_gives_the_same(num_rows: int, device) -> None:
    made = sample((70, 128), ()).to(device)
    x = inputs(num_rows, 128, torch.float16).to(device)
    assert error(forward(made, x, 6.0), decoded(x, 6.0) @ made.weights.T) < 5e-4


@pytest.mark.parametrize("num_outliers", [0, 32, 33, 128])
def test_any_number_of_columns_may_be_outliers(num_outliers: int, device) -> None:
    made = sample((7, 128), ()).to(device)
    x = inputs(20, 128, torch.float16, num_outliers).to(device)
    assert quantize_rows(x, 6.0)[2].sum() == num_outliers
    assert error(forward(made, x, 6.0), decoded(x, 6.0) @ made.weights.T) < 5e-4


@pytest.mark.parametrize("whole_rows", [True, False])
def test_every_output_is_written_and_nothing_beyond(whole_rows: bool, device) -> None:
    made = sample((21, 128), (), 128 if whole_rows else 64).to(device)
    x = inputs(5, 128, torch.bfloat16).to(device)
    quantized = rows_in_8_bits(x, 0.0)
    around = torch.full((5 * 21 + 2 * GUARD,), torch.nan, device=device)
    y = around[GUARD:-GUARD].view(5, 21)
    kernels._linear_int8_kernel[(2,)](
        *quantized[:2],
        x,
        None,
        None,
        made.packed,
        *made.scales[:3],
        dynamic_map(device),
        None,
        y,
        5,
        21,
        128,
        GROUP=made.group_size,
        WHOLE_ROWS=whole_rows,
        STEP=64,
        BLOCK_M=16,
        BLOCK_O=16,
    )
    assert error(y, decoded(x, 0.0) @ made.weights.T) < 1e-6
    assert around[:GUARD].isnan().all() and around[-GUARD:].isnan().all()


def test_sums_of_integers_are_exact(device) -> None:
    # the largest codes of either sign: a sum of 2^24 and more would not fit into float32
    packed = torch.full((2 * 2048,), 255, dtype=torch.uint8, device=device)
    packed[2047], packed[2048:] = 254, 0
    nothing = torch.empty(0, device=device)
    scales = Scales(torch.full((2,), 1 / 128, device=device), nothing, nothing)
    x = torch.ones(3, 2048, dtype=torch.float16, device=device)
    quantized = rows_in_8_bits(x, 0.0)
    y = kernels.linear(x, quantized, packed, scales, 2048, 2, None, False)
    sums = torch.tensor([127 * (127 * 2047 + 126), -128 * 127 * 2048], dtype=torch.float64)
    assert torch.equal(y[0].cpu(), (sums / 128 / 127).half())


def test_tiles_are_chosen_by_rows() -> None:
    assert [kernels.choose_tile(rows, False).rows for rows in (1, 16, 17, 64, 99, 9999)] == [
        16,
        16,
        64,
        64,
        128,
        128,
    ]
    assert [kernels.choose_tile(rows, True).rows for rows in (0, 128, 129, 9999)] == [
        16,
        128,
        256,
        256,
    ]


@pytest.mark.parametrize(
    ("width", "group_size", "columns"),
    [(128, 64, 64), (192, 128, 64), (256, 128, 128), (4096, 4096, 128), (320, 320, 64)],
)
def test_steps_lie_within_groups(width: int, group_size: int, columns: int) -> None:
    assert kernels.step_columns(width, group_size) == columns
