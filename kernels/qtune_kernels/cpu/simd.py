"""The language of the CPU kernels: Python expressions that write LLVM instructions.

A `Value` is an instruction's result: an integer, a float, an address, or a vector of them. Python's
operators on it emit LLVM instructions; Python's own loops and ifs run while the kernel is written,
so they unroll and specialize. What must happen at run time (loops, branches, loads, stores) is a
method of `Code`. Vectors have 16 lanes of float32 unless they say otherwise; LLVM splits them on
machines whose registers are narrower.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Union

from llvmlite import ir

from qtune_kernels.cpu import processor

LANES = 16


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite has no name for."""

    intrinsic_name = "bf16"

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F16, F32, F64, BF16 = ir.HalfType(), ir.FloatType(), ir.DoubleType(), _BFloat()
POINTER = ir.PointerType()

Operand = Union["Value", int, float]


def vector(element: ir.Type, lanes: int = LANES) -> ir.VectorType:
    """The type of `lanes` elements side by side."""
    return ir.VectorType(element, lanes)


class Value:
    """Something computed at run time; operators emit the instruction that computes the next."""

    __slots__ = ("code", "ir")

    def __init__(self, code: "Code", value: Any) -> None:
        self.code, self.ir = code, value

    @property
    def type(self) -> Any:
        """Its LLVM type."""
        return self.ir.type

    def __add__(self, other: Operand) -> "Value":
        if self.type == POINTER:
            offset = self.code.value(other, I64).ir
            return self._made(self.code.builder.gep(self.ir, [offset], source_etype=I8))
        return self._binary("add", other)

    def __sub__(self, other: Operand) -> "Value":
        return self._binary("sub", other)

    def __mul__(self, other: Operand) -> "Value":
        return self._binary("mul", other)

    def __rsub__(self, other: Operand) -> "Value":
        return self.code.value(other, self.type) - self

    __radd__, __rmul__ = __add__, __mul__

    def __truediv__(self, other: Operand) -> "Value":
        return self._made(self.code.builder.fdiv(self.ir, self._other(other)))

    def __rtruediv__(self, other: Operand) -> "Value":
        return self.code.value(other, self.type) / self

    def __floordiv__(self, other: Operand) -> "Value":
        """Unsigned division of integers."""
        return self._made(self.code.builder.udiv(self.ir, self._other(other)))

    def __mod__(self, other: Operand) -> "Value":
        """Unsigned remainder of integers."""
        return self._made(self.code.builder.urem(self.ir, self._other(other)))

    def __and__(self, other: Operand) -> "Value":
        return self._made(self.code.builder.and_(self.ir, self._other(other)))

    def __or__(self, other: Operand) -> "Value":
        return self._made(self.code.builder.or_(self.ir, self._other(other)))

    def __xor__(self, other: Operand) -> "Value":
        return self._made(self.code.builder.xor(self.ir, self._other(other)))

    def __lshift__(self, other: Operand) -> "Value":
        return self._made(self.code.builder.shl(self.ir, self._other(other)))

    def __rshift__(self, other: Operand) -> "Value":
        """Logical shift of unsigned integers."""
        return self._made(self.code.builder.lshr(self.ir, self._other(other)))

    def __neg__(self) -> "Value":
        return 0 - self

    def __lt__(self, other: Operand) -> "Value":
        return self._compare("<", other)

    def __ge__(self, other: Operand) -> "Value":
        return self._compare(">=", other)

    def __gt__(self, other: Operand) -> "Value":
        return self._compare(">", other)

    def equals(self, other: Operand) -> "Value":
        """Whether both are the same, i1 or lanes of it."""
        return self._compare("==", other)

    def to(self, kind: ir.Type) -> "Value":
        """The same numbers as elements of `kind`; integers count as unsigned, bf16 is rounded."""
        builder, target = self.code.builder, _like(self.type, kind)
        old, new = _element(self.type), kind
        if old == new:
            return self
        if new == BF16 and not processor.rounds_to_bf16():
            return self._rounded_to_bf16()
        if old == BF16:
            # the upper half of the float32
            words = self.bits(_like(self.type, I16)).to(I32) << 16
            return words.bits(_like(self.type, F32)).to(new)
        if _floats(old) and _floats(new):
            cast = builder.fpext if _width(old) < _width(new) else builder.fptrunc
        elif _floats(new):
            cast = builder.uitofp
        elif _floats(old):
            cast = builder.fptosi
        else:
            cast = builder.zext if old.width < new.width else builder.trunc
        return self._made(cast(self.ir, target))

    def _rounded_to_bf16(self) -> "Value":
        """Float32 to bf16, nearest even, by arithmetic on its bits."""
        words = self.bits(_like(self.type, I32))
        rounded = (words + 0x7FFF + (words >> 16 & 1)) >> 16
        is_nan = self._made(self.code.builder.fcmp_unordered("uno", self.ir, self.ir))
        quiet_nan = self.code.value(0x7FC0, words.type)
        bits = self.code.select(is_nan, quiet_nan, rounded).to(I16)
        return bits.bits(_like(self.type, BF16))

    def signed_to(self, kind: ir.Type) -> "Value":
        """As `to`, for integers that count as signed."""
        cast = self.code.builder.sitofp if _floats(kind) else self.code.builder.sext
        return self._made(cast(self.ir, _like(self.type, kind)))

    def bits(self, kind: ir.Type) -> "Value":
        """The same bits read as another type of the same size."""
        return self._made(self.code.builder.bitcast(self.ir, kind))

    def __getitem__(self, lane: int) -> "Value":
        return self._made(self.code.builder.extract_element(self.ir, I32(lane)))

    def shuffle(self, other: "Value", lanes: Sequence[int]) -> "Value":
        """Chosen lanes of this vector and, counted on from its end, another."""
        mask = ir.Constant(vector(I32, len(lanes)), [I32(lane) for lane in lanes])
        return self._made(self.code.builder.shuffle_vector(self.ir, other.ir, mask))

    def _binary(self, name: str, other: Operand) -> "Value":
        kind = "f" + name if _floats(_element(self.type)) else name
        return self._made(getattr(self.code.builder, kind)(self.ir, self._other(other)))

    def _compare(self, sign: str, other: Operand) -> "Value":
        builder = self.code.builder
        compare = builder.fcmp_ordered if _floats(_element(self.type)) else builder.icmp_unsigned
        return self._made(compare(sign, self.ir, self._other(other)))

    def _other(self, other: Operand) -> Any:
        return self.code.value(other, self.type).ir

    def _made(self, value: Any) -> "Value":
        return Value(self.code, value)


class Variable:
    """A value that changes from one round of a loop to the next."""

    def __init__(self, code: "Code", start: Value) -> None:
        self._code = code
        self._place, self._type = code.reserve(start.type), start.type
        self.set(start)

    def get(self) -> Value:
        """Its present value."""
        return Value(self._code, self._code.builder.load(self._place, typ=self._type))

    def set(self, value: Value) -> None:
        """Give it another value."""
        self._code.builder.store(value.ir, self._place)


class Code:
    """A function being written: where the next instruction goes, and what is not an operator."""

    def __init__(self, function: ir.Function) -> None:
        self.function = function
        self.builder = ir.IRBuilder(function.append_basic_block("entry"))

    def value(self, number: Operand, kind: ir.Type) -> Value:
        """A number as a value of that type, in every lane if it has lanes."""
        if isinstance(number, Value):
            return self.spread(number, kind.count) if _is_lone(number, kind) else number
        if isinstance(kind, ir.VectorType):
            element = kind.element
            return Value(self, ir.Constant(kind, [element(_number(number, element))] * kind.count))
        return Value(self, kind(_number(number, kind)))

    def integer(self, number: int) -> Value:
        """A constant address offset or count, i64."""
        return self.value(number, I64)

    def spread(self, one: Value, lanes: int = LANES) -> Value:
        """A single number in every lane."""
        empty = ir.Constant(vector(one.type, lanes), ir.Undefined)
        first = Value(self, self.builder.insert_element(empty, one.ir, I32(0)))
        return first.shuffle(Value(self, empty), [0] * lanes)

    def constants(self, numbers: Sequence[float], kind: ir.Type = F32) -> Value:
        """A vector of given numbers."""
        elements = [kind(_number(number, kind)) for number in numbers]
        return Value(self, ir.Constant(vector(kind, len(elements)), elements))

    def load(self, address: Value, kind: ir.Type, live: Value | None = None) -> Value:
        """What lies at an address; lanes that are not `live` are not read and hold 0."""
        stored = _stored(kind)
        if live is None:
            made = Value(self, self.builder.load(address.ir, typ=stored, align=1))
        else:
            made = self.call("llvm.masked.load", stored, address, live, self.value(0, stored))
        return made.bits(kind)

    def store(self, value: Value, address: Value, live: Value | None = None) -> None:
        """Write to an address, only the lanes that are `live`."""
        value = value.bits(_stored(value.type))
        if live is None:
            self.builder.store(value.ir, address.ir, align=1)
        else:
            self.call("llvm.masked.store", ir.VoidType(), value, address, live)

    def read(self, address: Value, kind: ir.Type, live: Value | None = None) -> Value:
        """Sixteen elements of `kind` as float32."""
        return self.load(address, vector(kind), live).to(F32)

    def write(self, x: Value, address: Value, kind: ir.Type, live: Value | None = None) -> None:
        """Sixteen float32 as elements of `kind`, rounded to nearest even."""
        self.store(x.to(kind), address, live)

    def first_lanes(self, count: Value) -> Value:
        """Which lanes, i1, are before `count`."""
        numbers = self.constants(range(LANES), I64)
        return numbers < self.spread(count)

    def variable(self, start: Value) -> Variable:
        """A value that a loop may change."""
        return Variable(self, start)

    @contextmanager
    def loop(self, stop: Operand, start: Operand = 0, step: Operand = 1) -> Iterator[Value]:
        """Run what is written inside for `start`, `start` + `step`, ... below `stop`, all i64."""
        first, last, stride = (self.value(number, I64) for number in (start, stop, step))
        before = self.builder.block
        head, body, after = (self.function.append_basic_block(n) for n in ("head", "body", "after"))
        self.builder.branch(head)
        self.builder.position_at_end(head)
        index = self.builder.phi(I64)
        index.add_incoming(first.ir, before)
        counter = Value(self, index)
        self.builder.cbranch((counter < last).ir, body, after)
        self.builder.position_at_end(body)
        yield counter
        index.add_incoming((counter + stride).ir, self.builder.block)
        self.builder.branch(head)
        self.builder.position_at_end(after)

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        """Run what is written inside only if the condition, i1, holds."""
        with self.builder.if_then(condition.ir):
            yield

    def select(self, condition: Value, yes: Value, no: Operand) -> Value:
        """One or the other, lane by lane."""
        return Value(self, self.builder.select(condition.ir, yes.ir, self.value(no, yes.type).ir))

    def smaller(self, a: Value, b: Operand) -> Value:
        """The lesser of two integers."""
        b = self.value(b, a.type)
        return self.select(a < b, a, b)

    def call(self, name: str, result: ir.Type, *arguments: Value) -> Value:
        """An LLVM intrinsic, or a function of this module, by name.

        Names of overloaded intrinsics are given without their types, which are appended.
        """
        kinds = [argument.type for argument in arguments]
        full = _mangled(name, result, kinds)
        module = self.function.module
        found = module.globals.get(full) or ir.Function(
            module, ir.FunctionType(result, kinds), full
        )
        return Value(self, self.builder.call(found, [argument.ir for argument in arguments]))

    def sqrt(self, x: Value) -> Value:
        """Square root."""
        return self.call("llvm.sqrt", x.type, x)

    def largest(self, a: Value, b: Operand) -> Value:
        """The greater of two floats."""
        return self.call("llvm.maxnum", a.type, a, self.value(b, a.type))

    def fma(self, a: Value, b: Operand, c: Operand) -> Value:
        """a * b + c, rounded once."""
        return self.call("llvm.fma", a.type, a, self.value(b, a.type), self.value(c, a.type))

    def sum(self, x: Value) -> Value:
        """The sum of all lanes, pairwise."""
        return self._fold(x, lambda a, b: a + b)

    def max(self, x: Value) -> Value:
        """The greatest of all lanes."""
        return self._fold(x, self.largest)

    def stack(self, num_bytes: int) -> Value:
        """The address of that many bytes of the function's own, on a cache line's border."""
        return Value(self, self.reserve(ir.ArrayType(I8, num_bytes)))

    def reserve(self, kind: ir.Type) -> Any:
        """Room for a value of that type for as long as the function runs."""
        with self.builder.goto_entry_block():
            place = self.builder.alloca(kind)
        place.align = 64
        # llvmlite still gives it the type of a typed pointer, which LLVM no longer reads
        place.type = POINTER
        return place

    def _fold(self, x: Value, combine: Any) -> Value:
        half = x.type.count // 2
        while half:
            x = combine(x.shuffle(x, range(half)), x.shuffle(x, range(half, 2 * half)))
            half //= 2
        return x[0]


def _mangled(name: str, result: ir.Type, kinds: Sequence[ir.Type]) -> str:
    """The full name of an overloaded intrinsic."""
    if name in ("llvm.masked.load", "llvm.masked.store"):
        data = kinds[0] if name.endswith("store") else result
        return f"{name}.{_short(data)}.p0"
    if name in ("llvm.sqrt", "llvm.maxnum", "llvm.fma", "llvm.exp2", "llvm.rint", "llvm.fabs"):
        return f"{name}.{_short(result)}"
    return name


def _short(kind: ir.Type) -> str:
    if isinstance(kind, ir.VectorType):
        return f"v{kind.count}{_short(kind.element)}"
    name: str = kind.intrinsic_name
    return name


def _element(kind: Any) -> Any:
    return kind.element if isinstance(kind, ir.VectorType) else kind


def _stored(kind: Any) -> Any:
    """As what a type is read and written: to processors without bf16 its numbers are 16 bits."""
    return _like(kind, I16) if _element(kind) == BF16 else kind


def _like(old: Any, kind: ir.Type) -> ir.Type:
    return vector(kind, old.count) if isinstance(old, ir.VectorType) else kind


def _floats(kind: Any) -> bool:
    return kind in (F16, F32, F64, BF16)


def _width(kind: Any) -> int:
    return {BF16: 16, F16: 16, F32: 32, F64: 64}[kind]


def _is_lone(value: Value, kind: Any) -> bool:
    return isinstance(kind, ir.VectorType) and not isinstance(value.type, ir.VectorType)


def _number(number: Any, kind: Any) -> Any:
    return float(number) if _floats(kind) else int(number)
