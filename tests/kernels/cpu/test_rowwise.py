import pytest
import torch

from qtune_kernels.cpu import rowwise
from qtune_kernels.cpu.jit import KernelCode, Pointer, available, kernel
from qtune_kernels.cpu.simd import Value


def test_one_dtype_of_two_is_taken() -> None:
    x = torch.randn(3)
    assert rowwise.takes(x, x) == rowwise.takes(x.bfloat16(), None) == available()
    assert not rowwise.takes(x, x.bfloat16())
    assert not rowwise.takes(x.half(), x.half())


def test_nothing_is_taken_where_kernels_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rowwise, "available", lambda: False)
    assert not rowwise.takes(torch.randn(3))


def test_kernels_know_dtypes_by_name() -> None:
    assert [rowwise.name(torch.zeros(1, dtype=dtype)) for dtype in rowwise.NAMES] == [
        "bf16",
        "fp32",
    ]


@kernel
def _double(code: KernelCode, x: Pointer, y: Pointer, *, width: int, dtype: str) -> None:
    size, kind = rowwise.BYTES[dtype], rowwise.KINDS[dtype]

    def visit(column: Value, turn: int, live: Value | None) -> None:
        doubled = code.read(x + column * size, kind, live) * 2.0
        code.write(doubled, y + column * size, kind, live)

    rowwise.walk(code, width, visit)


@pytest.mark.skipif(not available(), reason="no kernels for this processor")
@pytest.mark.parametrize("dtype", list(rowwise.NAMES))
@pytest.mark.parametrize("width", [1, 15, 16, 63, 64, 65, 150])
def test_each_element_of_a_row_is_visited_and_no_other(width: int, dtype: torch.dtype) -> None:
    x = torch.randn(width).to(dtype)
    around = torch.full((width + 128,), torch.nan, dtype=dtype)
    y = around[64:-64]
    _double(x.data_ptr(), y.data_ptr(), width=width, dtype=rowwise.name(x))
    assert torch.equal(y, 2 * x)
    assert around[:64].isnan().all() and around[-64:].isnan().all()
