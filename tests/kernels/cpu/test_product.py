"""Products with AMX against float64: codes and bf16, both ways, odd sizes, guarded results."""

from collections.abc import Iterator

import pytest
import torch
from samples import TABLES, Sample, error, sample
from stored_samples import stored_sample
from torch import Tensor

from qtune_kernels.cpu import product as module
from qtune_kernels.cpu import tiles
from qtune_kernels.cpu.product import Extension, Narrow, multiplies, product
from qtune_kernels.dequantize import Codes

pytestmark = pytest.mark.skipif(not tiles.available(), reason="no AMX")

# relative error of rounding the result to bf16, and a little for float32 sums in another order
ROUNDING = 2.0**-8
# every combination of what a kernel is compiled for costs 0.3 s, sizes cost nothing
SHAPES = [(160, 192), (96, 640)]


@pytest.fixture(autouse=True)
def one_thread_and_poisoned_buffers() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def fresh_cuts() -> Iterator[None]:
    """No cut by other constants is left over."""
    yield
    module._cut.cache_clear()


def recut(monkeypatch: pytest.MonkeyPatch, name: str, value: int) -> None:
    """Cut products by another constant; how they were cut is remembered."""
    monkeypatch.setattr(module, name, value)
    module._cut.cache_clear()


def codes(made: Sample) -> tuple[Codes, Tensor]:
    """The matrix as the products take it, and its weights as bf16 in float64."""
    shape = (made.weights.shape[0], made.weights.shape[1])
    matrix = Codes(made.packed, made.scales, made.levels, made.group_size, shape)
    return matrix, made.weights.float().bfloat16().double()


def rows(*shape: int) -> Tensor:
    """Random bf16 rows that lie apart, NaN between them."""
    around = torch.full((shape[0] + 2, shape[1] + 32), torch.nan, dtype=torch.bfloat16)
    return around[1:-1, : shape[1]].copy_(torch.randn(shape))


@pytest.mark.parametrize("num_rows", [1, 31, 32, 45, 96])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("table", TABLES)
def test_both_products_with_codes(table, shape, num_rows) -> None:
    matrix, weight = codes(sample(shape, TABLES[table]))
    x, dy = rows(num_rows, shape[1]), rows(num_rows, shape[0])
    y, dx = product(x, matrix, outputs_first=True), product(dy, matrix, outputs_first=False)
    assert error(y, x.double() @ weight.T) < ROUNDING
    assert error(dx, dy.double() @ weight) < ROUNDING
    assert y.shape == (num_rows, shape[0]) and dx.shape == (num_rows, shape[1])


@pytest.mark.parametrize(
    ("bits", "scales", "zeros"),
    # all of them are tested in test_decode.py
    [
        (4, torch.int8, torch.uint8),
        (3, torch.uint8, torch.uint8),
        (2, torch.float16, torch.float32),
        (8, torch.float32, torch.float16),
    ],
)
def test_other_way_of_storing_scales_and_zeros(bits, scales, zeros) -> None:
    matrix, weight = codes(stored_sample((64, 192), bits, scales, zeros))
    x = rows(33, 192)
    assert multiplies(x, matrix)
    # float32 sums of exact products
    y = product(x, matrix, outputs_first=True, dtype=torch.float32)
    assert error(y, x.double() @ weight.T) < 1e-6


@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 576), (4, 100)])
def test_input_gradients_with_whole_zeros(group_size, bits) -> None:
    made = stored_sample((96, 576), bits, torch.int8, torch.uint8, group_size)
    matrix, weight = codes(made)
    dy = rows(33, 96)
    dx = product(dy, matrix, outputs_first=False, dtype=torch.float32)
    assert error(dx, dy.double() @ weight) < 1e-6


@pytest.mark.parametrize(
    ("table", "group_size", "outputs_first"),
    # a scale for a half of what is read at a time, for all of it, and for more than a row
    [("nf4", 16, True), ("8 bits", 32, False), ("nf4", 256, True)],
)
def test_other_group_sizes(table, group_size, outputs_first) -> None:
    matrix, weight = codes(sample((64, 192), TABLES[table], group_size))
    left = rows(40, 192 if outputs_first else 64)
    truth = left.double() @ (weight.T if outputs_first else weight)
    assert error(product(left, matrix, outputs_first=outputs_first), truth) < ROUNDING


@pytest.mark.parametrize("num_rows", [3, 45])
def test_one_block_of_columns(num_rows) -> None:
    matrix, weight = codes(sample((32, 64)))
    x, dy = rows(num_rows, 64), rows(num_rows, 32)
    assert error(product(x, matrix, outputs_first=True), x.double() @ weight.T) < ROUNDING
    assert error(product(dy, matrix, outputs_first=False), dy.double() @ weight) < ROUNDING


@pytest.mark.parametrize("outputs_first", [True, False])
@pytest.mark.parametrize("num_threads", [2, 3])
def test_threads_share_rows_or_columns(monkeypatch, num_threads, outputs_first) -> None:
    matrix, _ = codes(sample((320, 192)))
    left = rows(130, 192 if outputs_first else 320)
    alone = product(left, matrix, outputs_first=outputs_first)
    torch.set_num_threads(num_threads)
    assert torch.equal(product(left, matrix, outputs_first=outputs_first), alone)
    recut(monkeypatch, "ROWS_TO_SPLIT", 1)
    assert torch.equal(product(left, matrix, outputs_first=outputs_first), alone)


@pytest.mark.parametrize("num_rows", [3, 64, 77])
def test_products_with_bf16(num_rows) -> None:
    weight, x, dy = rows(96, 160), rows(num_rows, 160), rows(num_rows, 96)
    truth = x.double() @ weight.double().T
    assert error(product(x, weight, outputs_first=True), truth) < ROUNDING
    # float32 sums of exact products
    assert error(product(x, weight, outputs_first=True, dtype=torch.float32), truth) < 1e-6
    assert error(product(dy, weight, outputs_first=False), dy.double() @ weight.double()) < ROUNDING


def narrow(rank: int, width: int, factor: float) -> tuple[Narrow, Tensor]:
    """Random float32 [rank, width], and what it stands for in bf16, float64."""
    matrix = torch.randn(rank, width)
    return Narrow(matrix, factor), (matrix * factor).bfloat16().double()


def columns(found: Narrow) -> Narrow:
    return Narrow(found.matrix.T.contiguous(), found.factor)


@pytest.mark.parametrize("rank", [1, 16, 21, 32])
@pytest.mark.parametrize("num_rows", [3, 50])
def test_a_second_pair_of_factors_and_a_bias_join_the_sums(num_rows, rank) -> None:
    matrix, weight = codes(sample((96, 128)))
    # the elements behind the rank are multiplied by the zeros that the right factor is filled with
    x, bias, left = rows(num_rows, 128), torch.randn(96).bfloat16(), rows(num_rows, 32).contiguous()
    right, right64 = narrow(rank, 96, 0.5)
    extension = Extension(left, columns(right))
    y = product(x, matrix, outputs_first=True, bias=bias, extension=extension)
    part = left[:, :rank].double()
    assert error(y, x.double() @ weight.T + part @ right64 + bias.double()) < ROUNDING
    dy = rows(num_rows, 96)
    below, below64 = narrow(rank, 128, 2.0)
    dx = product(dy, matrix, outputs_first=False, extension=Extension(left, below))
    assert error(dx, dy.double() @ weight + part @ below64) < ROUNDING


@pytest.mark.parametrize("rank", [1, 16, 21, 32])
def test_products_with_a_narrow_matrix(rank) -> None:
    x, (a, a64) = rows(40, 96), narrow(rank, 96, 1.5)
    truth = x.double() @ a64.T
    for u in (product(x, a, outputs_first=True), product(x, columns(a), outputs_first=False)):
        assert u.shape == (40, 32) and not u[:, rank:].any()
        assert error(u[:, :rank], truth) < ROUNDING


def test_sums_longer_than_a_piece(monkeypatch) -> None:
    monkeypatch.setattr(module, "MAX_DEPTH", 128)
    matrix, weight = codes(sample((320, 192)))
    x, dy, bias = rows(45, 192), rows(45, 320), torch.randn(320).bfloat16()
    left, (right, right64) = rows(45, 32).contiguous(), narrow(32, 320, 1.0)
    extension = Extension(left, columns(right))
    y = product(x, matrix, outputs_first=True, bias=bias, extension=extension)
    truth = x.double() @ weight.T + left.double() @ right64 + bias.double()
    assert error(y, truth) < ROUNDING
    assert error(product(dy, matrix, outputs_first=False), dy.double() @ weight) < ROUNDING
    a, a64 = narrow(8, 192, 1.0)
    assert error(product(x, a, outputs_first=True)[:, :8], x.double() @ a64.T) < ROUNDING


@pytest.mark.parametrize("chunk_steps", [1, 3, 5])
def test_sums_wait_between_chunks_without_loss(monkeypatch, chunk_steps) -> None:
    matrix, _ = codes(sample((96, 448)))
    x = rows(70, 448)
    whole = product(x, matrix, outputs_first=True, dtype=torch.float32)
    recut(monkeypatch, "CHUNK_STEPS", chunk_steps)
    assert torch.equal(product(x, matrix, outputs_first=True, dtype=torch.float32), whole)


def test_small_panels_change_no_bit(monkeypatch) -> None:
    matrix, _ = codes(sample((320, 128)))
    x = rows(130, 128)
    whole = product(x, matrix, outputs_first=True)
    recut(monkeypatch, "PANEL_BYTES", 1)
    assert torch.equal(product(x, matrix, outputs_first=True), whole)


@pytest.mark.parametrize("num_rows", [5, 40])
def test_a_given_result_is_filled_and_nothing_around_it(num_rows) -> None:
    weight, x = rows(64, 96), rows(num_rows, 96)
    around = torch.full((num_rows + 2, 64), torch.nan, dtype=torch.bfloat16)
    out = around[1:-1]
    assert product(x, weight, outputs_first=True, out=out) is out
    assert error(out, x.double() @ weight.double().T) < ROUNDING
    assert around[0].isnan().all() and around[-1].isnan().all()


def test_what_is_taken() -> None:
    matrix, _ = codes(sample((32, 64)))
    x = torch.empty(4, 64, dtype=torch.bfloat16)
    assert multiplies(x, matrix) and multiplies(x, torch.empty(32, 64, dtype=torch.bfloat16))
    assert not multiplies(x.float(), matrix)
    assert not multiplies(x.to("meta"), matrix)
    assert not multiplies(x, codes(sample((33, 64)))[0])
    assert not multiplies(x, codes(sample((32, 96)))[0])
    assert not multiplies(x, codes(sample((32, 64), group_size=8))[0])
    assert not multiplies(x, torch.empty(32, 64))
    assert multiplies(x, Narrow(torch.empty(8, 64))) and multiplies(x, Narrow(torch.empty(64, 8)))
    assert not multiplies(x, Narrow(torch.empty(40, 64)))
    assert not multiplies(x, Narrow(torch.empty(8, 65)))
    assert not multiplies(x, torch.empty(64, 32, dtype=torch.bfloat16).T)
