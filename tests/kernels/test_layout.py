import torch

from qtune_kernels.layout import as_rows, row_stride


def test_rows_that_lie_apart_are_not_copied() -> None:
    x = torch.randn(6, 10)[:, :7]
    rows = as_rows(x, 7)
    assert rows.data_ptr() == x.data_ptr() and row_stride(rows) == 10


def test_leading_dimensions_become_one() -> None:
    x = torch.randn(2, 3, 7)
    assert torch.equal(as_rows(x, 7), x.view(6, 7))
    assert as_rows(x[:, :0], 7).shape == (0, 7)


def test_elements_that_lie_apart_are_moved() -> None:
    x = torch.randn(7, 6).T
    rows = as_rows(x, 7)
    assert torch.equal(rows, x) and rows.stride() == (7, 1)


def test_a_single_row_may_have_one_dimension() -> None:
    assert row_stride(torch.randn(7)) == 7
    assert row_stride(torch.randn(2, 3, 7)) == 7
