"""How kernels that work row by row see tensors of any number of dimensions."""

from torch import Tensor


def as_rows(tensor: Tensor, width: int) -> Tensor:
    """The same as rows [T, width]; rows may lie apart, the elements of one may not."""
    rows = tensor.reshape(-1, width)
    return rows if rows.stride(1) == 1 or width == 1 else rows.contiguous()


def row_stride(tensor: Tensor) -> int:
    """Elements from the start of one row to that of the next, for [I] or [..., I]."""
    return tensor.stride(-2) if tensor.dim() > 1 else tensor.numel()
