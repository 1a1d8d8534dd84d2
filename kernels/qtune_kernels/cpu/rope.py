"""The CPU kernel of `rope`: the heads of a token turn by angles that stay in registers."""

from torch import Tensor

from qtune_kernels.cpu.jit import Integer, KernelCode, Pointer, kernel
from qtune_kernels.cpu.rowwise import BYTES, KINDS, NAMES
from qtune_kernels.cpu.simd import LANES, Code, Value
from qtune_kernels.rope import rotated_like


def rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """x [B, H, T, D] rotated; the result lies in memory as [B, T, H, D]."""
    out = rotated_like(x)
    x, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, cos, sin))
    batch, num_heads, num_tokens, head_size = x.shape
    _rope(
        x.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        out.data_ptr(),
        batch * num_tokens,
        num_tokens,
        num_heads,
        *x.stride()[:3],
        *_row_strides(cos),
        *_row_strides(sin),
        head_size=head_size,
        rotated=cos.shape[-1],
        dtype=NAMES[x.dtype],
        angle_dtype=NAMES[cos.dtype],
        inverse=inverse,
    )
    return out


def _row_strides(angles: Tensor) -> tuple[int, int]:
    """From one sample to the next, none where all share one, and from token to token."""
    return angles.stride(0) if angles.shape[0] > 1 else 0, angles.stride(1)


@kernel
def _rope(
    code: KernelCode,
    x: Pointer,
    cos: Pointer,
    sin: Pointer,
    out: Pointer,
    num_places: Integer,
    num_tokens: Integer,
    num_heads: Integer,
    batch_stride: Integer,
    head_stride: Integer,
    token_stride: Integer,
    cos_batch_stride: Integer,
    cos_token_stride: Integer,
    sin_batch_stride: Integer,
    sin_token_stride: Integer,
    *,
    head_size: int,
    rotated: int,
    dtype: str,
    angle_dtype: str,
    inverse: bool,
) -> None:
    size, angle_size = BYTES[dtype], BYTES[angle_dtype]
    with code.share(num_places) as place:
        sample, token = place // num_tokens, place % num_tokens
        x_at = x + (sample * batch_stride + token * token_stride) * size
        out_at = out + place * num_heads * (head_size * size)
        cos_at = cos + (sample * cos_batch_stride + token * cos_token_stride) * angle_size
        sin_at = sin + (sample * sin_batch_stride + token * sin_token_stride) * angle_size
        for column in range(0, rotated // 2, LANES):
            angles = _angles(code, cos_at, sin_at, column, rotated // 2, angle_dtype, inverse)
            with code.loop(num_heads) as head:
                source, target = x_at + head * head_stride * size, out_at + head * head_size * size
                _turn(code, source, target, angles, column, rotated // 2, dtype)
        for column in range(rotated, head_size, LANES):
            with code.loop(num_heads) as head:
                source, target = x_at + head * head_stride * size, out_at + head * head_size * size
                live = _live(code, head_size - column)
                kept = code.read(source + column * size, KINDS[dtype], live)
                code.write(kept, target + column * size, KINDS[dtype], live)


def _angles(
    code: Code, cos_at: Value, sin_at: Value, column: int, half: int, dtype: str, inverse: bool
) -> tuple[Value, Value, Value, Value]:
    """Cosines of both halves from `column` on, then sines, those of the transpose if `inverse`."""
    live = _live(code, half - column)
    first_cos, second_cos, first_sin, second_sin = (
        code.read(start + at * BYTES[dtype], KINDS[dtype], live)
        for start in (cos_at, sin_at)
        for at in (column, column + half)
    )
    if inverse:
        first_sin, second_sin = -second_sin, -first_sin
    return first_cos, second_cos, first_sin, second_sin


def _turn(
    code: Code,
    source: Value,
    target: Value,
    angles: tuple[Value, Value, Value, Value],
    column: int,
    half: int,
    dtype: str,
) -> None:
    size, kind, live = BYTES[dtype], KINDS[dtype], _live(code, half - column)
    low, high = column * size, (column + half) * size
    first_cos, second_cos, first_sin, second_sin = angles
    first, second = (code.read(source + at, kind, live) for at in (low, high))
    code.write(first * first_cos - second * first_sin, target + low, kind, live)
    code.write(second * second_cos + first * second_sin, target + high, kind, live)


def _live(code: Code, left: int) -> Value | None:
    """The lanes that are among `left` more elements; None for all."""
    return code.first_lanes(code.integer(left)) if left < LANES else None
