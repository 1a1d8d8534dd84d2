"""The stages of the transform: one factor at a time, and how its outputs are cut."""

import pytest
import torch

from qtune_kernels.cpu.hadamard_stages import MOST_SUMS, Stage, Transform, fast
from qtune_kernels.cpu.jit import KernelCode, Pointer, available, kernel
from qtune_kernels.hadamard_matrices import kronecker

pytestmark = pytest.mark.skipif(not available(), reason="no kernels for this processor")


@kernel
def _apply(
    code: KernelCode,
    source: Pointer,
    target: Pointer,
    matrix: Pointer,
    *,
    width: int,
    stage: Stage,
) -> None:
    Transform(code, width, "fp32", matrix).apply(stage, matrix, source, target)


@pytest.mark.parametrize(
    ("width", "stage"),
    [
        (24, Stage(2, 4, True)),
        (64, Stage(16, 2, True)),
        (48, Stage(12, 4, False)),
        (72, Stage(36, 1, False)),
    ],
)
def test_one_factor(width, stage) -> None:
    columns = torch.randn(width, 16)
    matrix = torch.randn(stage.order, stage.order)
    if stage.fast:
        matrix = kronecker((2,) * (stage.order.bit_length() - 1)).float()
    stored = torch.cat([matrix[:, part].flatten() for part in stage.outputs()])
    found = torch.full_like(columns, torch.nan)
    _apply(columns.data_ptr(), found.data_ptr(), stored.data_ptr(), width=width, stage=stage)
    parts = columns.double().view(-1, stage.order, stage.stride * 16)
    truth = torch.einsum("okr,kj->ojr", parts, matrix.double()).reshape(width, 16)
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", [12, 20, 28, 76, 344])
def test_outputs_are_made_in_parts_of_about_equal_size(order) -> None:
    parts = Stage(order, 1, False).outputs()
    sizes = [part.stop - part.start for part in parts]
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(order))
    assert max(sizes) <= MOST_SUMS and max(sizes) - min(sizes) <= 1


def test_sums_and_differences_are_sylvesters() -> None:
    x = torch.randn(8, dtype=torch.float64)
    truth = kronecker((2, 2, 2)).double() @ x
    torch.testing.assert_close(torch.stack(fast(list(x))), truth)
