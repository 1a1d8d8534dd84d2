"""Losses and their gradients against torch, in float64 and through the whole matrix of logits."""

import pytest
import torch
from samples import error
from test_softmax_gradient import CAPS, DTYPES
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy

from qtune_kernels import cross_entropy as kernels
from qtune_kernels.cross_entropy import (
    chunk_rows,
    linear_cross_entropy,
    linear_token_losses,
    losses_and_dhidden,
    losses_and_dlogits,
    summed_cross_entropy,
    token_losses,
)

CPU = torch.device("cpu")
VOCABULARY, WIDTH = 301, 24


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Rows of a chunk, as many as a test can have several times."""
    monkeypatch.setattr(kernels, "ROW_MULTIPLE", 8)
    monkeypatch.setattr(kernels, "CPU_CHUNK_BYTES", 0)
    return 8


def sample(
    num_rows: int, dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, targets and bias; logits are far from uniform."""
    hidden = torch.randn(num_rows, WIDTH).to(dtype).to(device).requires_grad_()
    weight, bias = torch.randn(VOCABULARY, WIDTH), torch.randn(VOCABULARY)
    targets = torch.randint(VOCABULARY, (num_rows,), device=device)
    return hidden, weight.to(dtype).to(device), targets, bias.to(dtype).to(device)


def by_torch(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The loss and the gradient of the hidden states, all in that dtype but for the softmax."""
    leaf = hidden.detach().to(dtype).requires_grad_()
    x = leaf @ weight.to(dtype).T * scale
    if bias is not None:
        x = x + bias.to(dtype) * scale
    if softcap is not None:
        x = torch.tanh(x / softcap) * softcap
    if dtype.itemsize < 8:
        x = x.float()
    loss = cross_entropy(x, targets, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("softcap", "scale"), CAPS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_as_exact_as_torch(with_bias, softcap, scale, dtype, small_chunks) -> None:
    hidden, weight, targets, bias = sample(2 * small_chunks + 5, dtype)
    head = (weight, targets, bias if with_bias else None, softcap, scale)
    loss = linear_cross_entropy(hidden, *head)
    loss.backward()
    true_loss, truth = by_torch(hidden, *head, torch.float64)
    plain_loss, plain = by_torch(hidden, *head, dtype)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert error(loss, true_loss) <= 2 * error(plain_loss, true_loss) + torch.finfo(dtype).eps / 4
    assert hidden.grad.dtype == dtype
    assert error(hidden.grad, truth) <= 2 * error(plain, truth) + 1e-6


@pytest.mark.parametrize("num_rows", [1, 7, 8, 9, 16, 17])
def test_chunks_meet_without_gap(num_rows, small_chunks) -> None:
    hidden, weight, targets, _ = sample(num_rows)
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    true_loss, truth = by_torch(hidden, weight, targets, None, None, 1.0, torch.float64)
    assert error(loss, true_loss) < 1e-6
    # each row by itself: an error in a few would be lost in the norm of all
    torch.testing.assert_close(hidden.grad.double(), truth, rtol=1e-4, atol=1e-5)


def test_backward_scales(small_chunks) -> None:
    hidden, weight, targets, _ = sample(20)
    (linear_cross_entropy(hidden, weight, targets) * 0.125).backward()
    _, truth = by_torch(hidden, weight, targets, None, None, 1.0, torch.float64)
    assert error(hidden.grad, truth * 0.125) < 1e-6


def test_losses_of_rows_and_gradients_that_weigh_them(small_chunks, monkeypatch) -> None:
    monkeypatch.setattr(kernels, "SCALED_ROWS", 8)
    hidden, weight, targets, bias = sample(2 * small_chunks + 5)
    factors = torch.linspace(-1, 2, len(targets))
    losses = linear_token_losses(hidden, weight, targets, bias, 5.0)
    (losses * factors).sum().backward()
    exact = hidden.detach().double().requires_grad_()
    x = torch.tanh((exact @ weight.double().T + bias.double()) / 5) * 5
    truths = cross_entropy(x, targets, reduction="none")
    (truths * factors.double()).sum().backward()
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), truths, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)


def test_losses_of_rows_of_logits_that_are_there_anyway() -> None:
    logits = torch.randn(37, VOCABULARY).requires_grad_()
    targets, factors = torch.randint(VOCABULARY, (37,)), torch.linspace(-1, 2, 37)
    losses = token_losses(logits, targets)
    (losses * factors).sum().backward()
    exact = logits.detach().double().requires_grad_()
    truths = cross_entropy(exact, targets, reduction="none")
    (truths * factors.double()).sum().backward()
    torch.testing.assert_close(losses.double(), truths, rtol=1e-5, atol=1e-5)
    assert error(logits.grad, exact.grad) < 1e-6


def test_backward_in_pieces_and_again(monkeypatch) -> None:
    monkeypatch.setattr(kernels, "SCALED_ROWS", 8)
    hidden, weight, targets, _ = sample(20)
    loss = linear_cross_entropy(hidden, weight, targets)
    first, second = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("how", ["no_grad", "frozen"])
def test_without_gradient_the_second_product_is_left_out(how, monkeypatch) -> None:
    hidden, weight, targets, bias = sample(20)
    expected = linear_cross_entropy(hidden, weight, targets, bias, 5.0).detach()
    monkeypatch.setattr(kernels, "softmax_gradient_", None)
    if how == "frozen":
        hidden = hidden.detach()
    with torch.set_grad_enabled(how == "frozen"):
        found = linear_cross_entropy(hidden, weight, targets, bias, 5.0)
    assert torch.equal(found, expected) and not found.requires_grad


def test_keeps_the_gradient_of_the_hidden_states_and_nothing_else() -> None:
    hidden, weight, targets, _ = sample(100, torch.bfloat16)
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear_cross_entropy(hidden, weight, targets)
    assert [(t.shape, t.dtype) for t in kept] == [(hidden.shape, torch.bfloat16)]


def test_two_losses_at_a_time_do_not_share_their_gradients(small_chunks) -> None:
    # on the CPU they do share the memory of their logits
    pairs = [sample(20), sample(33)]
    losses = [linear_cross_entropy(*pair[:3]) for pair in pairs]
    sum(losses).backward()
    for hidden, weight, targets, _ in pairs:
        truth = by_torch(hidden, weight, targets, None, None, 1.0, torch.float64)[1]
        assert error(hidden.grad, truth) < 1e-6


def test_a_head_that_is_trained_is_refused() -> None:
    hidden, weight, targets, bias = sample(3)
    for head in [(weight.requires_grad_(), None), (weight.detach(), bias.requires_grad_())]:
        with pytest.raises(ValueError, match="freeze it"):
            linear_cross_entropy(hidden, head[0], targets, head[1])


def test_nan_is_not_hidden() -> None:
    hidden, weight, targets, _ = sample(3)
    hidden.detach()[1, 5] = torch.nan
    assert linear_cross_entropy(hidden, weight, targets).isnan()


def test_what_rows_are_filled_up_with_is_not_seen() -> None:
    # the filling times an infinite weight is no number
    hidden, weight, targets, bias = sample(5)
    targets[:] = 7
    bias[300] = -torch.inf
    loss = linear_cross_entropy(hidden, weight, targets, bias)
    loss.backward()
    true_loss, truth = by_torch(hidden, weight, targets, bias, None, 1.0, torch.float64)
    assert error(loss, true_loss) < 1e-6 and error(hidden.grad, truth) < 1e-6


def test_no_rows() -> None:
    hidden, weight, targets, _ = sample(0)
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert float(loss.detach()) == 0 and hidden.grad.shape == (0, WIDTH)


def test_chunks_are_large_enough_to_be_worth_reading_the_weight() -> None:
    cuda = torch.device("cuda")
    assert chunk_rows(5000, 1 << 20, torch.bfloat16, cuda) == 1024
    assert 1024 < chunk_rows(5000, 49152, torch.bfloat16, cuda) <= (256 << 20) // (2 * 49152)
    for vocabulary in (1000, 49152, 262144):
        rows = chunk_rows(10**6, vocabulary, torch.bfloat16, CPU)
        assert rows % 64 == 0 and 64 <= rows <= (64 << 20) // (2 * vocabulary)
    assert chunk_rows(1000, 1 << 30, torch.float32, CPU) == 64


def test_few_rows_make_few_different_shapes() -> None:
    found = {chunk_rows(rows, 1000, torch.bfloat16, CPU) for rows in range(129)}
    assert found == {0, 64, 128}


def test_meta_tensors_have_the_same_shapes() -> None:
    hidden = torch.empty(20, WIDTH, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weight = torch.empty(VOCABULARY, WIDTH, dtype=torch.bfloat16, device="meta")
    targets = torch.empty(20, dtype=torch.int64, device="meta")
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert loss.is_meta and loss.dtype == torch.float32 and hidden.grad.shape == hidden.shape


def test_torch_compile_takes_the_op_as_it_is() -> None:
    hidden, weight, targets, _ = sample(20)

    def loss(hidden: Tensor) -> Tensor:
        return linear_cross_entropy(hidden * 2, weight, targets)

    loss(hidden).backward()
    expected, hidden.grad = hidden.grad, None
    torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden).backward()
    assert torch.equal(hidden.grad, expected)


@pytest.mark.parametrize("with_gradient", [False, True])
def test_the_ops_keep_the_rules_of_torch(with_gradient) -> None:
    hidden, weight, targets, bias = sample(20)
    hidden.requires_grad_(with_gradient)
    torch.library.opcheck(
        losses_and_dhidden, (hidden, weight, targets, None, None, 1.0, with_gradient)
    )
    torch.library.opcheck(
        losses_and_dhidden, (hidden, weight, targets, bias, 5.0, 0.5, with_gradient)
    )
    logits = torch.randn(20, VOCABULARY, requires_grad=with_gradient)
    torch.library.opcheck(losses_and_dlogits, (logits, targets, with_gradient))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_that_are_there_anyway(dtype) -> None:
    logits = (torch.randn(37, VOCABULARY) * 3).to(dtype).requires_grad_()
    before = logits.detach().clone()
    targets = torch.randint(VOCABULARY, (37,))
    loss = summed_cross_entropy(logits, targets)
    (loss * 0.5).backward()
    exact = before.double().requires_grad_()
    truth = cross_entropy(exact, targets, reduction="sum")
    (truth * 0.5).backward()
    assert error(loss, truth.detach()) < 1e-6
    rounded = error(exact.grad.to(dtype), exact.grad)
    assert error(logits.grad, exact.grad) <= 2 * rounded + 1e-6
    assert torch.equal(logits.detach(), before)
    with torch.no_grad():
        assert torch.equal(summed_cross_entropy(logits, targets), loss)


def test_logits_need_not_be_contiguous() -> None:
    logits = torch.randn(VOCABULARY, 20).T.requires_grad_()
    targets = torch.randint(VOCABULARY, (20,))
    summed_cross_entropy(logits, targets).backward()
    exact = logits.detach().double().requires_grad_()
    cross_entropy(exact, targets, reduction="sum").backward()
    assert error(logits.grad, exact.grad) < 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("softcap", "scale"), CAPS)
def test_cuda_is_as_exact_as_torch(softcap, scale, dtype, monkeypatch) -> None:
    monkeypatch.setattr(kernels, "CUDA_LEAST_ROWS", 0)
    monkeypatch.setattr(kernels, "CUDA_CHUNK_BYTES", 0)
    hidden, weight, targets, bias = sample(150, dtype, torch.device("cuda"))
    head = (weight, targets, bias, softcap, scale)
    loss = linear_cross_entropy(hidden, *head)
    loss.backward()
    true_loss, truth = by_torch(hidden, *head, torch.float64)
    plain_loss, plain = by_torch(hidden, *head, dtype)
    assert error(loss, true_loss) <= 2 * error(plain_loss, true_loss) + torch.finfo(dtype).eps / 4
    assert error(hidden.grad, truth) <= 2 * error(plain, truth) + 1e-6
