"""The layer with trained scales against autograd on a dense weight in float64."""

import pytest
import torch
from samples import NF4, THREE_BITS, TWO_BITS
from test_scale_gradient import SHAPES, random_codes
from torch import Tensor

from qtune_kernels.dequantize import dequantize
from qtune_kernels.scaled_linear import scaled_linear, stored_scales
from qtune_kernels.scales import pack_zeros

INT2, INT3, INT4 = (tuple(float(i) for i in range(1 << bits)) for bits in (2, 3, 4))
# levels, and whether the formats that have them have zero points
TABLES = {
    "nf4": (NF4, False),
    "3 bits": (THREE_BITS, False),
    "2 bits": (TWO_BITS, False),
    "int8": ((), False),
    "int4": (INT4, True),
    "int3": (INT3, True),
    "int2": (INT2, True),
}


def num_groups(shape: tuple[int, int], group_size: int) -> int:
    return -(-shape[0] * shape[1] // group_size)


def half_numbers(*shape: int) -> Tensor:
    """Positive numbers that float16 holds exactly, as float32: then there is no rounding to see."""
    return (torch.rand(*shape) + 0.5).half().float()


def dense(levels: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int) -> Tensor:
    """(level - zero) * scale, [O, I] in float64, differentiable."""

    def spread(values: Tensor) -> Tensor:
        return values.repeat_interleave(group_size)[: levels.numel()].view(levels.shape)

    shifted = levels if zeros is None else levels - spread(zeros)
    return shifted * spread(scales)


def agrees(found: Tensor, exact: Tensor) -> bool:
    difference = (found.detach().double() - exact.detach()).norm()
    return bool(difference <= 1e-5 * exact.detach().norm())


def gradients(x: Tensor, weight: Tensor, dy: Tensor, *wanted: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(x @ weight.T, (x, *wanted), dy)


@pytest.mark.parametrize(("levels", "has_zeros"), TABLES.values(), ids=TABLES.keys())
@pytest.mark.parametrize(("shape", "group_size"), SHAPES.values(), ids=SHAPES.keys())
def test_gradients_of_scales(shape, group_size, levels, has_zeros) -> None:
    packed, values = random_codes(shape, levels)
    scales = half_numbers(num_groups(shape, group_size))
    zeros = torch.randint(0, 4, scales.shape).float() if has_zeros else None
    stored = None if zeros is None else pack_zeros(zeros, len(levels).bit_length() - 1)
    x, dy = torch.randn(2, 3, shape[1]), torch.randn(2, 3, shape[0])

    leaves = [x.double().requires_grad_(), scales.double().requires_grad_()]
    weight = dense(values, leaves[1], None if zeros is None else zeros.double(), group_size)
    expected = gradients(leaves[0], weight, dy.double(), leaves[1])

    x.requires_grad_(), scales.requires_grad_()
    y = scaled_linear(x, packed, scales, None, stored, levels, group_size, shape[0], None)
    assert agrees(y, leaves[0] @ weight.T)
    for found, exact in zip(torch.autograd.grad(y, (x, scales), dy), expected, strict=True):
        assert agrees(found, exact)


@pytest.mark.parametrize("levels", [INT4, INT3, INT2, NF4, ()], ids=len)
@pytest.mark.parametrize(("shape", "group_size"), SHAPES.values(), ids=SHAPES.keys())
def test_gradients_of_shifts(shape, group_size, levels) -> None:
    packed, values = random_codes(shape, levels)
    scales = half_numbers(num_groups(shape, group_size))
    # zero points in eighths: their products with the scales, and quotients, are exact
    shifts = torch.randint(0, 9, scales.shape) / 8 * scales
    x, dy = torch.randn(4, shape[1]), torch.randn(4, shape[0])

    leaves = [t.double().requires_grad_() for t in (x, scales, shifts)]
    weight = dense(values, leaves[1], leaves[2] / leaves[1], group_size)
    expected = gradients(leaves[0], weight, dy.double(), *leaves[1:])

    ours = [t.requires_grad_() for t in (x, scales, shifts)]
    y = scaled_linear(x, packed, scales, shifts, None, levels, group_size, shape[0], None)
    assert agrees(y, leaves[0] @ weight.T)
    for found, exact in zip(torch.autograd.grad(y, ours, dy), expected, strict=True):
        assert agrees(found, exact)


def test_the_product_sees_what_will_be_stored() -> None:
    packed, _ = random_codes((6, 128), INT2)
    scales, shifts = torch.rand(12) * 0.02, torch.rand(12) * 0.03
    x = torch.randn(5, 128)
    y = scaled_linear(x, packed, scales, shifts, None, INT2, 64, 6, None)
    codes, _, _, zeros = stored_scales(scales, shifts, None)
    assert codes.dtype == zeros.dtype == torch.float16
    # read back from float16 by somebody who knows only the definition
    empty = torch.empty(0)
    weight = dequantize(packed, codes, empty, empty, zeros, INT2, 64, 6, 128, torch.float32)
    assert torch.equal(y, x @ weight.T)
    unrounded = dequantize(
        packed, scales, empty, empty, shifts / scales, INT2, 64, 6, 128, torch.float32
    )
    assert not torch.equal(weight, unrounded)


def test_a_group_whose_scale_is_zero_stays_finite() -> None:
    scales, shifts = torch.tensor([0.0, 0.5]), torch.tensor([0.25, 0.25])
    assert stored_scales(scales, shifts, None).zeros.tolist() == [0.0, 0.5]


def test_the_bias_has_its_gradient() -> None:
    packed, _ = random_codes((6, 64), NF4)
    bias = torch.randn(6, requires_grad=True)
    x, dy = torch.randn(2, 3, 64), torch.randn(2, 3, 6)
    y = scaled_linear(x, packed, torch.rand(6), None, None, NF4, 64, 6, bias)
    (found,) = torch.autograd.grad(y, bias, dy)
    torch.testing.assert_close(found, dy.sum((0, 1)))


def test_inputs_need_no_gradient() -> None:
    packed, values = random_codes((6, 64), NF4)
    scales = half_numbers(6).requires_grad_()
    x = torch.randn(3, 64)
    y = scaled_linear(x, packed, scales, None, None, NF4, 64, 6, None)
    y.sum().backward()
    assert agrees(scales.grad, (values * x.double().sum(0)).sum(1))


@pytest.mark.parametrize("trained", [False, True])
def test_the_op_is_well_formed(trained) -> None:
    packed, _ = random_codes((6, 64), INT4)
    scales = half_numbers(6).requires_grad_()
    shifts = half_numbers(6).requires_grad_() if trained else None
    zeros = None if trained else pack_zeros(torch.arange(6.0), 4)
    x = torch.randn(3, 64, requires_grad=True)
    torch.library.opcheck(scaled_linear, (x, packed, scales, shifts, zeros, INT4, 64, 6, None))
