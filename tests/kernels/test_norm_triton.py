"""The norm's Triton kernels against float64, with odd sizes, guarded and poisoned buffers."""

from collections.abc import Iterator

import pytest
import torch
from samples import error

from qtune_kernels.norm import add_rms_norm, rms_norm, rms_norm_dx

kernels = pytest.importorskip("qtune_kernels.norm_triton")

EPS = 1e-5
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(3, 7), (9, 32), (2, 3, 40), (1, 150)]
GUARD = 64
TILE = kernels._TILE


@pytest.fixture(autouse=True)
def poisoned_buffers() -> Iterator[None]:
    """Every new buffer starts as NaN, so that what is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def narrow_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows to a program, so that small tensors need several."""
    monkeypatch.setattr(kernels, "_TILE", 128)


def guarded(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Random numbers between NaN, so that a read beyond them shows."""
    values = torch.randn(shape, device=device).to(dtype)
    around = values.new_full((values.numel() + 2 * GUARD,), torch.nan)
    return around[GUARD:-GUARD].view(shape).copy_(values)


def norm(x: torch.Tensor, weight: torch.Tensor, offset: float) -> torch.Tensor:
    x, weight = x.double(), weight.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * (weight + offset)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_are_as_exact_as_those_of_torch(shape, dtype, offset, device) -> None:
    x, residual = (guarded(shape, dtype, device) for _ in range(2))
    weight = guarded(shape[-1:], dtype, device)
    truth, limit = norm(x, weight, offset), 2 * torch.finfo(dtype).eps
    y = kernels.rms_norm(x, weight, EPS, offset)
    assert y.shape == x.shape and error(y, truth) <= limit
    y, total = kernels.add_rms_norm(x, residual, weight, EPS, offset)
    assert torch.equal(total, x + residual)
    assert error(y, norm(total, weight, offset)) <= limit


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_as_exact_as_those_of_torch(shape, dtype, adds, device) -> None:
    x, dy, added = (guarded(shape, dtype, device) for _ in range(3))
    weight = guarded(shape[-1:], dtype, device)
    wide = x.double().requires_grad_()
    truth = torch.autograd.grad(norm(wide, weight, 1.0), wide, dy.double())[0]
    truth = truth + added.double() if adds else truth
    dx = kernels.rms_norm_dx(dy, x, weight, EPS, 1.0, added if adds else None)
    assert dx.shape == x.shape and error(dx, truth) <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bits_are_those_of_plain_torch_up_to_sums(dtype, device) -> None:
    x, weight = guarded((16, 48), dtype, device), guarded((48,), dtype, device)
    different = kernels.rms_norm(x, weight, EPS, 0.0) != rms_norm(x.cpu(), weight.cpu(), EPS).to(x)
    assert dtype == torch.float32 or different.float().mean() < 0.01


def test_rows_may_be_read_and_written_apart(device) -> None:
    x = guarded((6, 50), torch.bfloat16, device)[:, :40]
    residual, dy = (guarded((6, 40), torch.bfloat16, device) for _ in range(2))
    weight = guarded((40,), torch.bfloat16, device)
    for run, operands in ((kernels.rms_norm, [x]), (kernels.add_rms_norm, [x, residual])):
        buffer = torch.full((6, 56), torch.nan, dtype=torch.bfloat16, device=device)
        run(*operands, weight, EPS, 0.0, buffer[:, :40])
        dense = run(*[one.contiguous() for one in operands], weight, EPS, 0.0)
        dense = dense if isinstance(dense, torch.Tensor) else dense[0]
        assert torch.equal(buffer[:, :40], dense) and buffer[:, 40:].isnan().all()
    once = dy[0].expand(6, 40)
    assert torch.equal(
        kernels.rms_norm_dx(once, x, weight, EPS, 0.0, x),
        kernels.rms_norm_dx(once.contiguous(), x.contiguous(), weight, EPS, 0.0, x.contiguous()),
    )


def test_weights_need_not_be_dense(device) -> None:
    x = guarded((3, 40), torch.float32, device)
    apart = guarded((40, 2), torch.float32, device)[:, 0]
    assert error(kernels.rms_norm(x, apart, EPS, 0.0), norm(x, apart, 0.0)) < 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_ops_run_these_kernels_on_a_gpu(device) -> None:
    x, residual = (guarded((5, 96), torch.bfloat16, device).requires_grad_() for _ in range(2))
    weight = guarded((96,), torch.bfloat16, device)
    for room in (0, 8):
        torch.library.opcheck(rms_norm, (x, weight, EPS, 0.0, room))
        torch.library.opcheck(add_rms_norm, (x, residual, weight, EPS, 1.0, room))
    torch.library.opcheck(rms_norm_dx, (residual.detach(), x.detach(), weight, EPS, 0.0, None))


@pytest.mark.parametrize(
    ("width", "tile"),
    [
        (128, (16, 128, 8)),
        (256, (8, 256, 8)),
        (576, (2, 1024, 4)),
        (4096, (1, 4096, 8)),
        (14000, (1, 16384, 32)),
    ],
)
def test_tiles_hold_whole_rows(
    width: int, tile: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_TILE", TILE)
    assert kernels._tile(width) == tile
