"""The fused kernels against float64, with odd sizes, guarded and poisoned buffers."""

from collections.abc import Iterator

import pytest
import torch
from samples import COUNTED, NF4, TABLES, VARIANTS, Sample, error, sample

from qtune_kernels.linear_tiles import Tile
from qtune_kernels.lookup import lookup_ptx
from qtune_kernels.scales import dynamic_map

kernels = pytest.importorskip("qtune_kernels.linear_triton")

FEW = Tile(16, 32, warps=2, stages=2, few_rows=True)
MANY = Tile(16, 32, warps=4, stages=2)
DTYPES = [torch.bfloat16, torch.float16]
EVEN = tuple((code - 8) / 7 for code in range(16))
LEVELS = TABLES | {"even": EVEN}
BITS = pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS.keys())
GUARD = 256


@pytest.fixture(autouse=True)
def poisoned_buffers() -> Iterator[None]:
    """Every new buffer starts as NaN, so that what is not written shows."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(num_rows: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Random rows between NaN, so that a read beyond them shows."""
    guarded = torch.full((num_rows * width + 2 * GUARD,), torch.nan, dtype=dtype, device=device)
    rows = guarded[GUARD:-GUARD].view(num_rows, width)
    return rows.copy_(torch.randn(num_rows, width, device=device))


def forward(made: Sample, x: torch.Tensor, bias: torch.Tensor | None, tile: Tile) -> torch.Tensor:
    out_features = made.weights.shape[0]
    weight = (made.packed, made.scales, made.levels, made.group_size)
    return kernels.linear(x, *weight, out_features, bias, tile)


def backward(made: Sample, dy: torch.Tensor, tile: Tile) -> torch.Tensor:
    in_features = made.weights.shape[1]
    weight = (made.packed, made.scales, made.levels, made.group_size)
    return kernels.linear_dx(dy, *weight, in_features, tile)


@BITS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", [FEW, MANY], ids=["few rows", "many rows"])
@pytest.mark.parametrize("shape", [(45, 1024), (32, 512)])
def test_outputs_are_as_exact_as_those_of_torch(shape, tile, dtype, levels, device) -> None:
    made = sample(shape, levels).to(device)
    x = inputs(5 if tile.few_rows else 19, shape[1], dtype, device)
    truth = x.double() @ made.weights.T
    plain = error(x @ made.weights.to(dtype).T, truth)
    assert error(forward(made, x, None, tile), truth) <= 2 * plain


@BITS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(45, 1024), (131, 512)])
def test_input_gradients_are_as_exact_as_those_of_torch(shape, dtype, levels, device) -> None:
    made = sample(shape, levels).to(device)
    dy = inputs(19, shape[0], dtype, device)
    truth = dy.double() @ made.weights
    plain = error(dy @ made.weights.to(dtype), truth)
    assert error(backward(made, dy, MANY), truth) <= 2 * plain


@BITS
def test_small_weights_keep_their_precision(levels, device) -> None:
    made = sample((32, 512), levels, largest=1e-3).to(device)
    x, dy = (inputs(9, width, torch.float16, device) for width in (512, 32))
    forward_truth, backward_truth = x.double() @ made.weights.T, dy.double() @ made.weights
    plain = made.weights.half()
    assert error(forward(made, x, None, FEW), forward_truth) <= 2 * error(
        x @ plain.T, forward_truth
    )
    assert error(forward(made, x, None, MANY), forward_truth) <= 2 * error(
        x @ plain.T, forward_truth
    )
    assert error(backward(made, dy, MANY), backward_truth) <= 2 * error(dy @ plain, backward_truth)


@BITS
@pytest.mark.parametrize("group_size", [128, 512])
def test_groups_may_span_segments_and_rows(group_size: int, levels, device) -> None:
    made = sample((9, 1024), levels, group_size).to(device)
    x, dy = (inputs(3, width, torch.float16, device) for width in (1024, 9))
    assert error(forward(made, x, None, FEW), x.double() @ made.weights.T) < 1e-3
    assert error(forward(made, x, None, MANY), x.double() @ made.weights.T) < 1e-3
    assert error(backward(made, dy, MANY), dy.double() @ made.weights) < 1e-3


@pytest.mark.parametrize("levels", [COUNTED[name] for name in ("int4", "int3", "int2_sym")])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_kinds_of_scales_and_zeros_are_as_exact(dtype, variant, levels, device) -> None:
    made = sample((9, 512), levels, variant=variant).to(device)
    x, dy = (inputs(3, width, dtype, device) for width in (512, 9))
    truth, dx_truth = x.double() @ made.weights.T, dy.double() @ made.weights
    plain = made.weights.to(dtype)
    limit = 2 * error(x @ plain.T, truth)
    assert error(forward(made, x, None, FEW), truth) <= limit
    assert error(forward(made, x, None, MANY), truth) <= limit
    assert error(backward(made, dy, MANY), dx_truth) <= 2 * error(dy @ plain, dx_truth)


def test_bytes_may_have_zeros(device) -> None:
    made = sample((9, 256), variant=VARIANTS[-1], levels=()).to(device)
    x = inputs(3, 256, torch.float16, device)
    assert error(forward(made, x, None, FEW), x.double() @ made.weights.T) < 1e-3


@pytest.mark.parametrize("tile", [FEW, MANY], ids=["few rows", "many rows"])
@pytest.mark.parametrize("num_runs", [1, 9], ids=["one part", "several parts"])
def test_the_bias_is_added_once(num_runs: int, tile: Tile, device) -> None:
    made = sample((21, num_runs * 128)).to(device)
    x = inputs(4, num_runs * 128, torch.float16, device)
    bias = torch.randn(21, device=device).half()
    truth = x.double() @ made.weights.T + bias.double()
    assert error(forward(made, x, bias, tile), truth) < 1e-3


def test_leading_dimensions_and_strides_are_free(device) -> None:
    made = sample((21, 256)).to(device)
    x = torch.randn(2, 256, 3, device=device).half().transpose(1, 2)
    y = forward(made, x, None, MANY)
    assert y.shape == (2, 3, 21)
    assert error(y, x.double() @ made.weights.T) < 1e-3
    assert error(backward(made, y, MANY), y.double() @ made.weights) < 1e-3


@pytest.mark.parametrize("run", ["forward", "backward"])
def test_results_repeat_bit_for_bit(run: str, device) -> None:
    made = sample((96, 1152)).to(device)
    x, dy = (inputs(5, width, torch.bfloat16, device) for width in (1152, 96))
    results = [
        forward(made, x, None, FEW) if run == "forward" else backward(made, dy, MANY)
        for _ in range(2)
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("name", ["_few_rows_kernel", "_many_rows_kernel", "_dx_kernel"])
def test_each_part_is_written_in_its_place_and_nothing_beyond(name: str, device) -> None:
    made = sample((45, 640)).to(device)
    is_dx = name == "_dx_kernel"
    rows = inputs(5, 45 if is_dx else 640, torch.bfloat16, device)
    width = 640 if is_dx else 45
    num_tiles, num_parts, steps_a_part = (5, 2, 1) if is_dx else (2, 2, 3)
    guarded = torch.full((num_parts * 5 * width + 2 * GUARD,), torch.nan, device=device)
    sums = guarded[GUARD:-GUARD].view(num_parts, 5, width)
    getattr(kernels, name)[(num_tiles, num_parts)](
        rows,
        made.packed,
        *made.scales,
        dynamic_map(device),
        *(() if is_dx else (None,)),
        sums,
        5,
        45,
        5,
        steps_a_part,
        LOOKUP=lookup_ptx(NF4, torch.bfloat16),
        BITS=4,
        SEGMENTS=2,
        STRIPS=1,
        GROUP=64,
        BLOCK_M=16,
        BLOCK_O=32,
    )
    for part in range(num_parts):
        if is_dx:
            own = slice(32 * part, 32 * (part + 1))
            truth = rows[:, own].double() @ made.weights[own]
        else:
            own = slice(3 * 128 * part, 3 * 128 * (part + 1))
            truth = rows[:, own].double() @ made.weights[:, own].T
        assert error(sums[part], truth) < 5e-3
    assert guarded[:GUARD].isnan().all() and guarded[-GUARD:].isnan().all()
