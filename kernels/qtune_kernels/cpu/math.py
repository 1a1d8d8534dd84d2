"""Functions that LLVM has no vector instruction for."""

from math import factorial, log

from qtune_kernels.cpu import processor
from qtune_kernels.cpu.simd import BF16, I16, I32, LANES, Code, Value, vector

# ln 2 in two parts: up to 2^15 times the first is exact in float32
LN2_HIGH = 0.693359375
LN2_LOW = log(2) - LN2_HIGH
# below the first, exp is 0 in float32, above the second infinite
LEAST, MOST = -104.0, 89.0
# of the Taylor series; on [-ln 2 / 2, ln 2 / 2] what follows is less than 6e-9
DEGREE = 7
# vscalefps: no lane is left out, rounding as the thread is set to
ALL_LANES, PRESENT_ROUNDING = 0xFFFF, 4
# vreduceps: subtract the number rounded down to an integer, and raise no exception
FROM_FLOOR = 0b1001
# of 2^x on [0, 1): the polynomial of degree 5 whose largest relative error is least, 7.5e-8
POWERS_OF_TWO = (
    0.9999999250635262,
    0.6931530732001692,
    0.2401536170443785,
    0.05582631805327807,
    0.008989340090521493,
    0.0018775766751789032,
)


def exp(code: Code, x: Value) -> Value:
    """e^x of 16 float32, to a relative error of 2e-7; 0, infinity and NaN where they belong."""
    x = code.select(x < LEAST, code.value(LEAST, x.type), x)
    x = code.select(x > MOST, code.value(MOST, x.type), x)
    power = code.call("llvm.rint", x.type, x * (1 / log(2)))
    rest = code.fma(power, -LN2_LOW, code.fma(power, -LN2_HIGH, x))
    series = code.value(1 / factorial(DEGREE), x.type)
    for degree in reversed(range(DEGREE)):
        series = code.fma(series, rest, 1 / factorial(degree))
    mask, rounding = code.value(ALL_LANES, I16), code.value(PRESENT_ROUNDING, I32)
    scale = "llvm.x86.avx512.mask.scalef.ps.512"
    return code.call(scale, x.type, series, power, series, mask, rounding)


def exp2(code: Code, x: Value) -> Value:
    """2^x of 16 float32, to a relative error of 2e-7; 0 far below, x finite.

    Nine instructions, about half of what `exp` takes. It needs AVX-512 DQ.
    """
    mask, rounding = code.value(ALL_LANES, I16), code.value(PRESENT_ROUNDING, I32)
    reduce, scale = (f"llvm.x86.avx512.mask.{name}.ps.512" for name in ("reduce", "scalef"))
    rest = code.call(reduce, x.type, x, code.value(FROM_FLOOR, I32), x, mask, rounding)
    series = code.value(POWERS_OF_TWO[-1], x.type)
    for factor in reversed(POWERS_OF_TWO[:-1]):
        series = code.fma(series, rest, factor)
    # this one rounds its exponent down itself
    return code.call(scale, x.type, series, x, series, mask, rounding)


def sigmoid(code: Code, x: Value) -> Value:
    """1 / (1 + e^-x) of 16 float32."""
    return 1.0 / (exp(code, -x) + 1.0)


def to_bf16(code: Code, low: Value, high: Value) -> Value:
    """Thirty-two float32 rounded to bf16, `low` first."""
    kind = vector(BF16, 2 * LANES)
    if processor.rounds_to_bf16():
        return code.call("llvm.x86.avx512bf16.cvtne2ps2bf16.512", kind, high, low)
    words = [half.to(BF16).bits(vector(I16)) for half in (low, high)]
    return words[0].shuffle(words[1], range(2 * LANES)).bits(kind)
