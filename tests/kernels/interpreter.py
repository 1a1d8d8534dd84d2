"""Triton's interpreter made right for bfloat16, and able to run this project's inline PTX.

The interpreter of Triton 3.6 and 3.9 keeps bfloat16 in uint16 arrays: products, sums and dots work
on those integers and return garbage, conversions from integers likewise, and float32 is cut off
instead of rounded. It has no inline assembly. `correct_interpreter` replaces the few methods at
fault by ones that compute in float32 and round to the nearest even, and runs PTX by the model in
ptx_model.py. It is to be called once, after `TRITON_INTERPRET=1` was set and Triton imported.

Not made right, because the kernels do not use it: bfloat16 atomics and math functions.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import ptx_model
import triton.language as tl
from triton.runtime import interpreter

Handle = interpreter.TensorHandle
Builder = interpreter.InterpreterBuilder


def to_float32(bits: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16 bits in uint16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits, uint16, of the bfloat16 nearest to each float32; ties to even, NaN to 0x7FC0."""
    values = np.asarray(values, dtype=np.float32, order="C")
    bits = values.view(np.uint32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), nearest)


def correct_interpreter() -> None:
    """Replace the interpreter's methods, once for each process."""
    if getattr(Builder, "corrected", False):
        return
    Builder.corrected = True
    Builder.create_dot = _dot(Builder.create_dot)
    Builder.binary_op = _binary_op(Builder.binary_op)
    Builder.unary_op = _unary_op(Builder.unary_op)
    Builder.cast_impl = _cast(Builder.cast_impl)
    Builder.create_inline_asm = _inline_asm
    interpreter._patch_lang_tensor = _with_index(interpreter._patch_lang_tensor)


def _is_bfloat16(handle: Any) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def _values(handle: Any) -> np.ndarray:
    return to_float32(handle.data) if _is_bfloat16(handle) else handle.data


def _dot(stock: Callable[..., Any]) -> Callable[..., Any]:
    def dot(self: Any, left: Any, right: Any, sums: Any, *rest: Any) -> Any:
        if not _is_bfloat16(left):
            return stock(self, left, right, sums, *rest)
        product = np.matmul(_values(left), _values(right), dtype=np.float32)
        return Handle(product.astype(sums.data.dtype) + sums.data, sums.dtype.scalar)

    return dot


def _binary_op(stock: Callable[..., Any]) -> Callable[..., Any]:
    def binary_op(self: Any, left: Any, right: Any, operation: Callable[..., Any]) -> Any:
        if not _is_bfloat16(left):
            return stock(self, left, right, operation)
        result = operation(_values(left), _values(right))
        if result.dtype == np.bool_:
            return Handle(result, tl.int1)
        return Handle(to_bfloat16(result), tl.bfloat16)

    return binary_op


def _unary_op(stock: Callable[..., Any]) -> Callable[..., Any]:
    def unary_op(self: Any, operand: Any, operation: Callable[..., Any]) -> Any:
        if not _is_bfloat16(operand):
            return stock(self, operand, operation)
        return Handle(to_bfloat16(operation(_values(operand))), tl.bfloat16)

    return unary_op


def _cast(stock: Callable[..., Any]) -> Callable[..., Any]:
    def cast(self: Any, source: Any, target: Any) -> Any:
        kind = source.dtype.scalar
        if target.scalar == tl.bfloat16 and (kind == tl.float32 or not kind.is_floating()):
            rounded = to_bfloat16(source.data.astype(np.float32))
            return Handle(rounded.reshape(source.data.shape), tl.bfloat16)
        if _is_bfloat16(source) and not target.scalar.is_floating():
            integers = _values(source).astype(interpreter._get_np_dtype(target))
            return Handle(integers, target.scalar)
        return stock(self, source, target)

    return cast


class _Results:
    """What the language front end expects of an operation with several results."""

    def __init__(self, handles: list[Any]) -> None:
        self.handles = handles

    def get_result(self, number: int) -> Any:
        return self.handles[number]


def _inline_asm(
    self: Any,
    text: str,
    constraints: str,
    operands: list[Any],
    types: list[Any],
    pure: bool,
    pack: int,
) -> _Results:
    """`pack` neighbouring elements make up 32-bit registers, of operands and of results.

    Operands are all of one shape by now; one of 32 bits takes `pack` registers.
    """
    shape = operands[0].data.shape
    inputs: list[np.ndarray] = []
    for operand in operands:
        elements = np.ascontiguousarray(np.broadcast_to(operand.data, shape)).reshape(-1, pack)
        inputs += list(elements.view(np.uint32).T)
    dtypes = [interpreter._get_np_dtype(kind.scalar) for kind in types]
    counts = [pack * np.dtype(dtype).itemsize // 4 for dtype in dtypes]
    registers = ptx_model.run(text, inputs, sum(counts))
    handles, first = [], 0
    for kind, dtype, count in zip(types, dtypes, counts, strict=True):
        words = np.stack(registers[first : first + count], 1)
        handles.append(Handle(words.view(dtype).reshape(shape), kind.scalar))
        first += count
    return _Results(handles)


def _with_index(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Triton 3.6 asks for int() of arrays with one element, which numpy 2.4 refuses."""

    def patch(tensor: Any, scope: Any, *rest: Any) -> None:
        stock(tensor, scope, *rest)
        scope.set_attr(tensor, "__index__", lambda one: int(_only(one)))
        scope.set_attr(tensor, "__bool__", lambda one: bool(_only(one)))

    return patch


def _only(tensor: Any) -> Any:
    return np.asarray(tensor.handle.data).reshape(-1)[0]
