"""RoPE's Triton kernel against the plain version, guarded and poisoned."""

from collections.abc import Iterator

import pytest
import torch
from samples import error

from qtune_kernels.rope import rope

kernels = pytest.importorskip("qtune_kernels.rope_triton")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
GUARD = 64


@pytest.fixture(autouse=True)
def poisoned_buffers() -> Iterator[None]:
    """Every new buffer starts as NaN, so that what is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def guarded(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Random numbers between NaN, so that a read beyond them shows."""
    values = torch.randn(shape, device=device)
    around = torch.full((values.numel() + 2 * GUARD,), torch.nan, dtype=dtype, device=device)
    return around[GUARD:-GUARD].view(shape).copy_(values)


def truth(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool) -> torch.Tensor:
    """x [B, H, T, D] times the matrix of the rotation, or its transpose, in float64."""
    size, rotated = x.shape[-1], cos.shape[-1]
    half = rotated // 2
    turn = torch.eye(rotated, dtype=torch.float64, device=x.device).roll(half, 0)
    turn[half:] *= -1
    matrix = torch.eye(size, dtype=torch.float64, device=x.device).repeat(*cos.shape[:2], 1, 1)
    matrix[..., :rotated, :rotated] = torch.diag_embed(
        cos.double()
    ) + turn * sin.double().unsqueeze(-2)
    matrix = matrix.transpose(-1, -2) if inverse else matrix
    return torch.einsum("bhti,btij->bhtj", x.double(), matrix.expand(x.shape[0], -1, -1, -1))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "rotated", "batch"), [(32, 32, 1), (20, 20, 2), (24, 12, 1)])
def test_results_are_as_exact_as_those_of_torch(
    size, rotated, batch, dtype, inverse, device
) -> None:
    q, k = (guarded((2, 3, heads, size), dtype, device).transpose(1, 2) for heads in (3, 1))
    cos, sin = (guarded((batch, 3, rotated), dtype, device) for _ in range(2))
    for one, x in zip(kernels.rope(q, k, cos, sin, inverse), (q, k), strict=True):
        assert one.dtype == dtype and one.transpose(1, 2).is_contiguous()
        assert error(one, truth(x, cos, sin, inverse)) <= 2 * torch.finfo(dtype).eps


def test_operands_may_lie_anyhow(device) -> None:
    fused = guarded((2, 3, 4, 32), torch.bfloat16, device)
    q, k = fused[:, :, :3].transpose(1, 2), fused[:, :, 3:].transpose(1, 2)
    cos, sin = (guarded((1, 3, 32), torch.float32, device) for _ in range(2))
    spread = torch.stack([q, q], -1)[..., 0]
    expected = rope(q.cpu(), k.cpu(), cos.cpu(), sin.cpu())
    for queries in (q, q.contiguous(), spread):
        turned = kernels.rope(queries, k, cos, sin, False)
        for one, other in zip(turned, expected, strict=True):
            torch.testing.assert_close(one.cpu(), other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("inverse", [False, True])
def test_the_op_runs_this_kernel_on_a_gpu(inverse, device) -> None:
    q, k = (guarded((2, 3, heads, 32), torch.bfloat16, device) for heads in (4, 2))
    q, k = (one.transpose(1, 2).requires_grad_() for one in (q, k))
    cos, sin = (guarded((1, 3, 32), torch.bfloat16, device) for _ in range(2))
    torch.library.opcheck(rope, (q, k, cos, sin, inverse))
