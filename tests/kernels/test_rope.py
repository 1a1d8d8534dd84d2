"""RoPE against transformers in float64, natively and in plain PyTorch."""

import pytest
import torch
from samples import error

from qtune_kernels.cpu import rowwise
from qtune_kernels.rope import rope

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# head size, rotated part of it
SIZES = [(64, 64), (20, 20), (48, 24), (40, 12), (2, 2)]


@pytest.fixture(autouse=True, params=["native", "plain"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "plain":
        monkeypatch.setattr(rowwise, "available", lambda: False)
    elif not rowwise.available():
        pytest.skip("no kernels for this processor")
    return str(request.param)


def operands(size: int, rotated: int, batch: int = 2) -> list[torch.Tensor]:
    """q [2, 3, 5, D], k [2, 1, 5, D] as a model's layers make them, cos and sin."""
    q, k = (torch.randn(2, 5, heads, size).transpose(1, 2) for heads in (3, 1))
    return [q, k, *(torch.randn(batch, 5, rotated) for _ in range(2))]


def truth(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb

    q, k, cos, sin = (tensor.double() for tensor in tensors)
    return apply_rotary_pos_emb(q, k, cos, sin)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "rotated"), SIZES)
def test_outputs_and_gradients_are_those_of_float64(size, rotated, dtype, batch) -> None:
    q, k, cos, sin = (tensor.to(dtype) for tensor in operands(size, rotated, batch))
    inputs = [q.requires_grad_(), k.requires_grad_()]
    ours, exact = rope(*inputs, cos, sin), truth(*inputs, cos, sin)
    along = torch.randn_like(q), torch.randn_like(k)
    pairs = [
        *zip(ours, exact, strict=True),
        *zip(
            torch.autograd.grad(ours, inputs, along),
            torch.autograd.grad(exact, inputs, [one.double() for one in along]),
            strict=True,
        ),
    ]
    for one, other in pairs:
        assert one.dtype == dtype and error(one, other.double()) < 2 * torch.finfo(dtype).eps


def test_the_inverse_turns_back() -> None:
    q, k, angles, _ = operands(40, 12)
    angles[..., 6:] = angles[..., :6]
    there = rope(q, k, angles.cos(), angles.sin())
    for one, other in zip(rope(*there, angles.cos(), angles.sin(), True), (q, k), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_results_lie_token_by_token_whatever_the_operands_do(dtype) -> None:
    q, k, cos, sin = (tensor.to(dtype) for tensor in operands(32, 32))
    expected = rope(q, k, cos, sin)
    fused = torch.cat([q.transpose(1, 2), k.transpose(1, 2)], 2)  # [2, 5, 4, 32]
    parts = fused[:, :, :3].transpose(1, 2), fused[:, :, 3:].transpose(1, 2)
    spread = torch.stack([q.contiguous()] * 2, -1)[..., 0], k.contiguous()
    for queries, keys in (parts, spread):
        for one, other in zip(rope(queries, keys, cos, sin), expected, strict=True):
            assert torch.equal(one, other) and one.transpose(1, 2).is_contiguous()


def test_angles_may_be_float32() -> None:
    q, k, cos, sin = operands(32, 32)
    ours = rope(q.bfloat16(), k.bfloat16(), cos, sin)
    exact = truth(q.bfloat16(), k.bfloat16(), cos, sin)
    for one, other in zip(ours, exact, strict=True):
        assert one.dtype == torch.bfloat16 and error(one, other) < 0.01


@pytest.mark.parametrize("shape", [(3, 5, 32), (2, 4, 32), (2, 5, 34), (2, 5, 7)])
def test_angles_of_another_shape_are_refused(shape) -> None:
    q, k, _, _ = operands(32, 32)
    with pytest.raises(ValueError, match=r"must be \[1 or 2, 5, an even number up to 32\]"):
        rope(q, k, torch.randn(shape), torch.randn(shape))


def test_queries_and_keys_that_do_not_fit_are_refused() -> None:
    q, k, cos, sin = operands(32, 32)
    with pytest.raises(ValueError, match="differ in more than heads"):
        rope(q, k[:, :, :4], cos, sin)


@pytest.mark.parametrize("inverse", [False, True])
def test_the_op_keeps_the_rules_of_torch(inverse) -> None:
    q, k, cos, sin = (tensor.bfloat16() for tensor in operands(20, 12, 1))
    torch.library.opcheck(rope, (q.requires_grad_(), k.requires_grad_(), cos, sin, inverse))
