import subprocess
import sys

import pytest
import torch
from int8_samples import activations, decoded
from samples import VARIANTS, Sample, error, sample
from torch import Tensor

from qtune_kernels.linear import linear, linear_dx
from qtune_kernels.linear_int8 import linear_int8
from qtune_kernels.scales import dequantize_scales

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# groups within rows, across their ends, of a row, of two rows
LAYOUTS = [((33, 192), 64), ((7, 130), 64), ((12, 128), 128), ((9, 96), 192)]


def forward(made: Sample, x: Tensor, threshold: float = 6.0, bias: Tensor | None = None) -> Tensor:
    out_features = made.weights.shape[0]
    weight = (made.packed, *made.scales, made.group_size, out_features)
    return linear_int8(x, *weight, bias, threshold)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_no_number_stays_so_and_alone(bad: float, layout) -> None:
    made = sample(layout[0], (), layout[1])
    x = torch.randn(4, layout[0][1])
    x[2, 5] = bad
    y = forward(made, x)
    assert not y[2].isfinite().any()
    assert y[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [6.0, 0.0], ids=["outliers", "none"])
@pytest.mark.parametrize(("shape", "group_size"), LAYOUTS)
def test_outputs_are_as_exact_as_those_of_torch(shape, group_size, threshold, dtype) -> None:
    made = sample(shape, (), group_size)
    x, bias = activations(11, shape[1], dtype=dtype), torch.randn(shape[0], dtype=dtype)
    rows = decoded(x, threshold)
    truth = rows @ made.weights.T + bias.double()
    plain = rows.float() @ made.weights.T.float() + bias.float()
    y = forward(made, x, threshold, bias)
    assert y.dtype == dtype
    assert error(y, truth) <= 2 * error(plain.to(dtype), truth) + 1e-7


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.zeros != "codes"], ids=str)
@pytest.mark.parametrize(("shape", "group_size"), [*LAYOUTS, ((5, 100), 100)])
def test_all_kinds_of_scales_and_zeros_multiply(shape, group_size, variant) -> None:
    made = sample(shape, (), group_size, variant=variant)
    x = activations(11, shape[1])
    assert error(forward(made, x), decoded(x, 6.0) @ made.weights.T) < 1e-6


@pytest.mark.parametrize(("shape", "group_size"), LAYOUTS)
def test_gradients_pass_the_rounding_straight_through(shape, group_size) -> None:
    made = sample(shape, (), group_size)
    x, bias = activations(2, 3, shape[1]).requires_grad_(), torch.randn(shape[0]).requires_grad_()
    y = forward(made, x, bias=bias)
    dy = torch.randn_like(y)
    y.backward(dy)
    weight = (made.packed, *made.scales, [], group_size, shape[1])
    assert torch.equal(x.grad, linear_dx(dy, *weight))
    assert error(x.grad, dy.double() @ made.weights) < 1e-6
    assert torch.allclose(bias.grad, dy.sum((0, 1)))


def test_outliers_left_in_cost_the_others_their_precision() -> None:
    made = sample((64, 256), ())
    x = torch.randn(32, 256).clamp_(-5, 5)
    x[:, 3] *= 40
    truth = x.double() @ made.weights.T
    with_outliers, without = (error(forward(made, x, at), truth) for at in (6.0, 0.0))
    assert 4 * with_outliers < without < 0.1


def test_more_outliers_come_nearer_to_activations_of_16_bits() -> None:
    made = sample((64, 256), ())
    x = torch.randn(32, 256)
    weight = (made.packed, *made.scales, [], 64, 64)
    exact = linear(x, *weight, None)
    assert torch.allclose(forward(made, x, threshold=1e-6), exact, atol=1e-6)
    assert error(forward(made, x, threshold=3.0), exact) < error(forward(made, x, 0.0), exact)


@pytest.mark.parametrize("threshold", [6.0, 0.0], ids=["outliers", "none"])
def test_outputs_agree_with_those_of_linear8bitlt(threshold: float) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    made = sample((24, 128), (), 128)
    x, bias = activations(10, 128, dtype=torch.float16), torch.randn(24).half()
    layer = bitsandbytes.nn.Linear8bitLt(
        128, 24, has_fp16_weights=False, threshold=threshold
    ).eval()
    layer.state.CB = (made.packed ^ 128).view(torch.int8).view(24, 128)
    layer.state.SCB = dequantize_scales(made.scales) * 127
    layer.weight.data, layer.bias.data = layer.state.CB, bias
    truth = decoded(x, threshold) @ made.weights.T + bias.double()
    ours, theirs = forward(made, x, threshold, bias), layer(x)
    assert error(ours, truth) <= 1.1 * error(theirs, truth)
    assert error(ours, theirs.double()) < 5e-3


@pytest.mark.parametrize(("shape", "group_size"), LAYOUTS)
def test_the_ops_keep_the_rules_of_torch(shape, group_size) -> None:
    made = sample(shape, (), group_size)
    weight = (made.packed, *made.scales, group_size, shape[0])
    x, bias = activations(3, shape[1]).requires_grad_(), torch.randn(shape[0], requires_grad=True)
    torch.library.opcheck(linear_int8, (x, *weight, bias, 6.0))
    torch.library.opcheck(linear_int8, (x, *weight, None))


def test_only_codes_are_saved_for_the_backward() -> None:
    made = sample((64, 256), ())
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks
    with hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        forward(made, torch.randn(2, 256, requires_grad=True))
    assert saved
    assert sum(tensor.nbytes for tensor in saved) < 1.1 * 64 * 256


@pytest.mark.parametrize(("shape", "group_size"), LAYOUTS)
def test_no_rows_are_no_trouble(shape, group_size) -> None:
    y = forward(sample(shape, (), group_size), torch.empty(2, 0, shape[1]))
    assert y.shape == (2, 0, shape[0])


def test_rows_with_strides_are_taken_as_they_are() -> None:
    made = sample((7, 64), ())
    x = torch.randn(2, 64, 3).transpose(1, 2)
    y = forward(made, x)
    assert y.shape == (2, 3, 7)
    assert torch.equal(y, forward(made, x.contiguous()))


def test_importing_the_ops_does_not_import_triton() -> None:
    code = "import sys, qtune_kernels.linear_int8; assert 'triton' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("threshold", [6.0, 0.0], ids=["outliers", "none"])
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("group_size", [32, 64, 128, 1152])
@pytest.mark.parametrize("num_rows", [1, 17, 300])
def test_cuda_results_are_those_of_the_cpu(num_rows, group_size, dtype, threshold) -> None:
    made = sample((389, 1152), (), group_size)
    x = activations(num_rows, 1152, dtype=dtype).requires_grad_()
    y = forward(made, x, threshold)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    there = x.detach().cuda().requires_grad_()
    cuda_y = forward(made.to(there.device), there, threshold)
    (cuda_dx,) = torch.autograd.grad(cuda_y, there, dy.cuda())
    assert error(cuda_y.cpu(), y.double()) < 5e-3
    assert error(cuda_dx.cpu(), dx.double()) < 1e-2
