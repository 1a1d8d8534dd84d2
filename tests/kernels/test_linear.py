import subprocess
import sys

import pytest
import torch
from samples import COUNTED, NF4, Sample, Variant, error, sample
from torch.utils.checkpoint import checkpoint

from qtune_kernels.linear import linear, linear_dx

BITS = pytest.mark.parametrize("levels", [NF4, ()], ids=["4 bits", "8 bits"])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPE = (33, 192)


def forward(made: Sample, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    weight = (made.packed, *made.scales, made.levels, made.group_size)
    return linear(x, *weight, made.weights.shape[0], bias)


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


@BITS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [SHAPE, (7, 130), (1, 64)])
def test_outputs_and_gradients_are_as_exact_as_those_of_torch(shape, dtype, levels) -> None:
    made = sample(shape, levels)
    x, bias = leaf(2, 5, shape[1], dtype=dtype), leaf(shape[0], dtype=dtype)
    y = forward(made, x, bias)
    dy = torch.randn_like(y)
    y.backward(dy)

    plain_x, plain_bias = (tensor.detach().clone().requires_grad_() for tensor in (x, bias))
    plain_y = torch.nn.functional.linear(plain_x, made.weights.to(dtype), plain_bias)
    plain_y.backward(dy)
    true_x, true_bias = (tensor.detach().double().requires_grad_() for tensor in (x, bias))
    true_y = torch.nn.functional.linear(true_x, made.weights, true_bias)
    true_y.backward(dy.double())

    triples = [(y, plain_y, true_y)]
    triples += [(x.grad, plain_x.grad, true_x.grad), (bias.grad, plain_bias.grad, true_bias.grad)]
    for ours, plain, truth in triples:
        assert ours.dtype == dtype
        assert error(ours, truth) <= 2 * error(plain, truth) + 1e-7


# the first two fit the matrix kernel of some processors
@pytest.mark.parametrize(
    ("name", "variant", "shape", "group_size"),
    [
        ("int4", Variant("linear", "codes"), (64, 128), 64),
        ("int3_sym", Variant("half", "half"), (64, 128), 32),
        ("int2", Variant("linear", "codes"), (7, 100), 100),
        ("int2_sym", Variant("linear"), (33, 192), 192),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_all_kinds_of_weights_multiply(name, variant, shape, group_size, dtype) -> None:
    made = sample(shape, COUNTED[name], group_size, variant=variant)
    x = leaf(40, shape[1], dtype=dtype)
    y = forward(made, x)
    dy = torch.randn_like(y)
    y.backward(dy)
    weights = made.weights.to(dtype)
    triples = [(y, x @ weights.T, x.detach().double() @ made.weights.T)]
    triples += [(x.grad, dy @ weights, dy.double() @ made.weights)]
    for ours, plain, truth in triples:
        assert error(ours, truth) <= 2 * error(plain, truth) + 1e-7


def test_gradients_agree_with_differences() -> None:
    made = sample((5, 64), COUNTED["int4"], variant=Variant("linear", "codes"))
    x = leaf(3, 64, dtype=torch.float64)
    bias = leaf(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *leaves: forward(made, *leaves), (x, bias))


def test_only_codes_are_saved_for_the_backward() -> None:
    made = sample((64, 256))
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks
    with hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        forward(made, leaf(2, 256))
    assert saved
    assert sum(tensor.nbytes for tensor in saved) < 0.6 * 64 * 256


def test_no_gradient_is_computed_that_nobody_wants() -> None:
    made = sample(SHAPE)
    x, bias = torch.randn(4, 192), leaf(33)
    forward(made, x, bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((33,), 4.0))
    assert x.grad is None


def test_checkpointing_gives_the_same_gradient() -> None:
    made = sample(SHAPE)
    x = leaf(4, 192)
    forward(made, x).square().sum().backward()
    expected, x.grad = x.grad, None
    checkpoint(lambda inner: forward(made, inner), x, use_reentrant=False).square().sum().backward()
    assert torch.equal(x.grad, expected)


def test_torch_compile_takes_the_ops_as_they_are() -> None:
    made = sample(SHAPE)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return (forward(made, x) * 2).square().sum()

    x = leaf(4, 192)
    loss(x).backward()
    expected, x.grad = x.grad, None
    torch.compile(loss, fullgraph=True, backend="aot_eager")(x).backward()
    assert torch.equal(x.grad, expected)


def test_meta_tensors_have_the_same_shapes() -> None:
    made = sample((6, 100)).to(torch.device("meta"))
    x = torch.empty(2, 3, 100, dtype=torch.bfloat16, device="meta", requires_grad=True)
    y = forward(made, x)
    assert y.shape == (2, 3, 6) and y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.shape == x.shape


@BITS
@pytest.mark.parametrize("variant", [Variant(), Variant("half", "half")], ids=str)
def test_the_ops_keep_the_rules_of_torch(variant, levels) -> None:
    made = sample(SHAPE, levels, variant=variant)
    weight = (made.packed, *made.scales, list(levels), 64)
    torch.library.opcheck(linear, (leaf(3, 192), *weight, 33, leaf(33)))
    torch.library.opcheck(linear, (leaf(3, 192), *weight, 33, None))
    torch.library.opcheck(linear_dx, (torch.randn(3, 33), *weight, 192))


def test_no_rows_are_no_trouble() -> None:
    assert forward(sample(SHAPE), torch.empty(0, 192)).shape == (0, 33)


def test_importing_the_ops_does_not_import_triton() -> None:
    code = "import sys, qtune_kernels.linear; assert 'triton' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@BITS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 3, 16, 17, 64, 250, 300])
def test_cuda_results_are_as_exact_as_those_of_torch(num_rows, dtype, levels) -> None:
    made = sample((389, 1152), levels).to(torch.device("cuda"))
    x = torch.randn(num_rows, 1152, dtype=dtype, device="cuda", requires_grad=True)
    y = forward(made, x)
    dy = torch.randn_like(y)
    y.backward(dy)
    weights = made.weights.to(dtype)
    pairs = [(y, x @ weights.T, x.double() @ made.weights.T)]
    pairs += [(x.grad, dy @ weights, dy.double() @ made.weights)]
    for ours, plain, truth in pairs:
        assert error(ours, truth) <= 2 * error(plain, truth) + 1e-6
