"""The CPU kernels of `rms_norm`, `add_rms_norm` and `rms_norm_dx`.

A row is read from memory once: the second walk along it finds it in the first-level cache.
"""

from torch import Tensor

from qtune_kernels.cpu.jit import Integer, KernelCode, Number, Pointer, kernel
from qtune_kernels.cpu.rowwise import BYTES, KINDS, UNROLL, name, walk
from qtune_kernels.cpu.simd import F32, Code, Value, Variable, vector
from qtune_kernels.layout import as_rows, row_stride


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """The norm of x [..., I]."""
    y = x.new_empty(x.shape)
    rows, weight = as_rows(x, x.shape[-1]), weight.contiguous()
    _rms_norm(
        rows.data_ptr(),
        weight.data_ptr(),
        y.data_ptr(),
        len(rows),
        row_stride(rows),
        float(eps),
        float(offset),
        width=x.shape[-1],
        dtype=name(x),
        rounds=offset == 0,
    )
    return y


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    """The norm of x + residual [..., I], and that sum."""
    total, y = x.new_empty(x.shape), x.new_empty(x.shape)
    width = x.shape[-1]
    rows, residual_rows = as_rows(x, width), as_rows(residual, width)
    weight = weight.contiguous()
    _add_rms_norm(
        rows.data_ptr(),
        residual_rows.data_ptr(),
        weight.data_ptr(),
        total.data_ptr(),
        y.data_ptr(),
        len(rows),
        row_stride(rows),
        row_stride(residual_rows),
        float(eps),
        float(offset),
        width=width,
        dtype=name(x),
        rounds=offset == 0,
    )
    return y, total


def rms_norm_dx(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float, added: Tensor | None
) -> Tensor:
    """The gradient of x [..., I] from that of y, plus `added`."""
    width = x.shape[-1]
    dx = x.new_empty(x.shape)
    dy_rows, rows, weight = as_rows(dy, width), as_rows(x, width), weight.contiguous()
    added_rows = dy_rows if added is None else as_rows(added, width)
    _rms_norm_dx(
        dy_rows.data_ptr(),
        rows.data_ptr(),
        weight.data_ptr(),
        added_rows.data_ptr(),
        dx.data_ptr(),
        len(rows),
        row_stride(dy_rows),
        row_stride(rows),
        row_stride(added_rows),
        float(eps),
        float(offset),
        width=width,
        dtype=name(x),
        adds=added is not None,
    )
    return dx


@kernel
def _rms_norm(
    code: KernelCode,
    x: Pointer,
    weight: Pointer,
    y: Pointer,
    num_rows: Integer,
    x_stride: Integer,
    eps: Number,
    offset: Number,
    *,
    width: int,
    dtype: str,
    rounds: bool,
) -> None:
    size, kind = BYTES[dtype], KINDS[dtype]
    with code.share(num_rows) as row:
        x_at, y_at = x + row * x_stride * size, y + row * (width * size)
        squares = _sums(code)

        def measure(column: Value, turn: int, live: Value | None) -> None:
            value = code.read(x_at + column * size, kind, live)
            squares[turn].set(code.fma(value, value, squares[turn].get()))

        walk(code, width, measure)
        rstd = _reciprocal_rms(code, squares, width, eps)
        _normalize(code, x_at, weight, y_at, rstd, offset, width, dtype, rounds)


@kernel
def _add_rms_norm(
    code: KernelCode,
    x: Pointer,
    residual: Pointer,
    weight: Pointer,
    total: Pointer,
    y: Pointer,
    num_rows: Integer,
    x_stride: Integer,
    residual_stride: Integer,
    eps: Number,
    offset: Number,
    *,
    width: int,
    dtype: str,
    rounds: bool,
) -> None:
    size, kind = BYTES[dtype], KINDS[dtype]
    with code.share(num_rows) as row:
        x_at, residual_at = x + row * x_stride * size, residual + row * residual_stride * size
        total_at, y_at = total + row * (width * size), y + row * (width * size)
        squares = _sums(code)

        def add(column: Value, turn: int, live: Value | None) -> None:
            at = column * size
            value = code.read(x_at + at, kind, live) + code.read(residual_at + at, kind, live)
            value = value.to(kind)
            code.store(value, total_at + at, live)
            value = value.to(F32)
            squares[turn].set(code.fma(value, value, squares[turn].get()))

        walk(code, width, add)
        rstd = _reciprocal_rms(code, squares, width, eps)
        _normalize(code, total_at, weight, y_at, rstd, offset, width, dtype, rounds)


@kernel
def _rms_norm_dx(
    code: KernelCode,
    dy: Pointer,
    x: Pointer,
    weight: Pointer,
    added: Pointer,
    dx: Pointer,
    num_rows: Integer,
    dy_stride: Integer,
    x_stride: Integer,
    added_stride: Integer,
    eps: Number,
    offset: Number,
    *,
    width: int,
    dtype: str,
    adds: bool,
) -> None:
    size, kind = BYTES[dtype], KINDS[dtype]
    with code.share(num_rows) as row:
        dy_at, x_at = dy + row * dy_stride * size, x + row * x_stride * size
        added_at, dx_at = added + row * added_stride * size, dx + row * (width * size)
        squares, products = _sums(code), _sums(code)

        def operands(column: Value, live: Value | None) -> tuple[Value, Value]:
            at = column * size
            scale = code.read(weight + at, kind, live) + offset
            return code.read(x_at + at, kind, live), code.read(dy_at + at, kind, live) * scale

        def measure(column: Value, turn: int, live: Value | None) -> None:
            value, gradient = operands(column, live)
            squares[turn].set(code.fma(value, value, squares[turn].get()))
            products[turn].set(code.fma(value, gradient, products[turn].get()))

        walk(code, width, measure)
        rstd = _reciprocal_rms(code, squares, width, eps)
        share = code.spread(_total(code, products) / width) * rstd * rstd

        def write(column: Value, turn: int, live: Value | None) -> None:
            value, gradient = operands(column, live)
            result = (gradient - value * share) * rstd
            if adds:
                result = result + code.read(added_at + column * size, kind, live)
            code.write(result, dx_at + column * size, kind, live)

        walk(code, width, write)


def _sums(code: Code) -> list[Variable]:
    """Sums to be taken side by side, all 0."""
    return [code.variable(code.value(0.0, vector(F32))) for _ in range(UNROLL)]


def _total(code: Code, sums: list[Variable]) -> Value:
    first, *others = (one.get() for one in sums)
    return code.sum(sum(others, first))


def _reciprocal_rms(code: Code, squares: list[Variable], width: int, eps: Value) -> Value:
    """One over the root mean square, in every lane."""
    return code.spread(1.0 / code.sqrt(_total(code, squares) / width + eps))


def _normalize(
    code: Code,
    x_at: Value,
    weight: Value,
    y_at: Value,
    rstd: Value,
    offset: Value,
    width: int,
    dtype: str,
    rounds: bool,
) -> None:
    """Write a row of y; `rounds`: the normalized x is rounded before the weight is multiplied."""
    size, kind = BYTES[dtype], KINDS[dtype]

    def write(column: Value, turn: int, live: Value | None) -> None:
        normal = code.read(x_at + column * size, kind, live) * rstd
        scale = code.read(weight + column * size, kind, live)
        if rounds:
            normal = normal.to(kind).to(F32)
        else:
            scale = scale + offset
        code.write(normal * scale, y_at + column * size, kind, live)

    walk(code, width, write)
