"""Sums over groups against float64: every width of codes, group sizes of all kinds, odd shapes."""

import pytest
import torch
from samples import NF4, THREE_BITS, TWO_BITS, error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qtune_kernels import scale_gradient as module
from qtune_kernels.packing import code_bits, pack
from qtune_kernels.scale_gradient import join_units, scale_gradient

TABLES = {"nf4": NF4, "3 bits": THREE_BITS, "2 bits": TWO_BITS, "8 bits": ()}
# matrix, group size: segments, less, rows, the whole matrix, groups over the ends of rows
SHAPES = {
    "64": ((24, 128), 64),
    "16": ((10, 64), 16),
    "256 over rows": ((9, 64), 256),
    "row of 576": ((20, 576), 576),
    "tensor": ((17, 100), 1700),
    "over the ends of rows": ((13, 100), 64),
    "odd": ((7, 33), 16),
    "one": ((1, 1), 64),
}


def random_codes(shape: tuple[int, int], levels: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Packed codes, and float64 levels [O, I]."""
    bits = code_bits(levels)
    codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8)
    values = levels or tuple(float(code - 128) for code in range(256))
    return pack(codes, bits), torch.tensor(values, dtype=torch.float64)[codes.long()]


def truth(dy: Tensor, x: Tensor, levels: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """The two sums in float64, group by group."""
    gradient = dy.double().flatten(0, -2).T @ x.double().flatten(0, -2)
    groups = [(gradient * levels).view(-1).split(group_size), gradient.view(-1).split(group_size)]
    of_levels, of_weights = (torch.stack([group.sum() for group in each]) for each in groups)
    return of_levels, of_weights


@pytest.mark.parametrize("levels", TABLES.values(), ids=TABLES.keys())
@pytest.mark.parametrize(("shape", "group_size"), SHAPES.values(), ids=SHAPES.keys())
def test_sums_are_those_of_float64(shape, group_size, levels) -> None:
    packed, values = random_codes(shape, levels)
    dy, x = torch.randn(2, 5, shape[0]), torch.randn(2, 5, shape[1])
    found = scale_gradient(dy, x, packed, levels, group_size)
    for sums, expected in zip(found, truth(dy, x, values, group_size), strict=True):
        assert sums.dtype == torch.float32
        assert error(sums, expected) < 1e-5


@pytest.mark.parametrize("levels", TABLES.values(), ids=TABLES.keys())
@pytest.mark.parametrize("in_features", [100, 64, 33])
def test_many_tiles_are_as_good_as_one(in_features, levels, monkeypatch) -> None:
    monkeypatch.setattr(module, "TILE", 512)
    shape = (1100, in_features)
    packed, values = random_codes(shape, levels)
    dy, x = torch.randn(4, shape[0]), torch.randn(4, shape[1])
    found = scale_gradient(dy, x, packed, levels, 64)
    for sums, expected in zip(found, truth(dy, x, values, 64), strict=True):
        assert error(sums, expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_inputs_cost_what_rounding_each_entry_costs(dtype) -> None:
    packed, values = random_codes((64, 192), NF4)
    dy, x = torch.randn(32, 64).to(dtype), torch.randn(32, 192).to(dtype)
    found = scale_gradient(dy, x, packed, NF4, 64)
    for sums, expected in zip(found, truth(dy, x, values, 64), strict=True):
        assert sums.dtype == torch.float32
        assert error(sums, expected) < torch.finfo(dtype).eps


def test_no_rows_give_zeros() -> None:
    packed, _ = random_codes((4, 64), NF4)
    found = scale_gradient(torch.zeros(0, 4), torch.zeros(0, 64), packed, NF4, 64)
    assert [sums.tolist() for sums in found] == [[0.0] * 4] * 2


def test_results_repeat_bit_for_bit() -> None:
    packed, _ = random_codes((300, 100), TWO_BITS)
    dy, x = torch.randn(16, 300), torch.randn(16, 100)
    first = scale_gradient(dy, x, packed, TWO_BITS, 64)
    again = scale_gradient(dy, x, packed, TWO_BITS, 64)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


class Largest(TorchDispatchMode):
    """The largest tensor that any operation within returns, in bytes."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.size = max(self.size, result.nbytes)
        return result


def test_no_dense_gradient_is_ever_made() -> None:
    shape = (4096, 1024)
    packed, _ = random_codes(shape, TWO_BITS)
    dy, x = torch.randn(8, shape[0]), torch.randn(8, shape[1])
    with Largest() as largest:
        module.plain(dy, x, packed, TWO_BITS, 64)
    dense = 4 * shape[0] * shape[1]
    assert 0 < largest.size <= 4 * module.TILE < dense // 4


def test_units_are_joined_wherever_they_begin() -> None:
    groups, sums = join_units(torch.tensor([1.0, 2, 4, 8, 16]), 5, 3)
    # unit 5 ends group 1; 6 to 8 are group 2; 9 begins group 3
    assert (groups, sums.tolist()) == (slice(1, 4), [1.0, 14.0, 16.0])


def test_shapes_are_known_without_data() -> None:
    packed = torch.empty(32 * 64 // 2, dtype=torch.uint8, device="meta")
    dy, x = torch.empty(3, 7, 32, device="meta"), torch.empty(3, 7, 64, device="meta")
    for sums in scale_gradient(dy, x, packed, NF4, 64):
        assert (sums.shape, sums.dtype) == ((32,), torch.float32)


def test_the_op_is_well_formed() -> None:
    packed, _ = random_codes((6, 64), NF4)
    arguments = (torch.randn(3, 6), torch.randn(3, 64), packed, NF4, 64)
    torch.library.opcheck(scale_gradient, arguments)
