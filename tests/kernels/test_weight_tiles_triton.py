"""Strips of tiles: the levels of the very codes that were packed, and their groups' scales."""

import pytest
import torch
from samples import COUNTED, TABLES, VARIANTS, Sample, sample
from torch import Tensor

from qtune_kernels.lookup import decoder
from qtune_kernels.packing import STRIP_SEGMENTS, TILE_SEGMENTS, code_bits, unpack
from qtune_kernels.scales import dequantize_scales, dynamic_map

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from qtune_kernels.dequantize_triton import load_offset  # noqa: E402
from qtune_kernels.weight_tiles_triton import strip_scales, strip_weights  # noqa: E402

pytestmark = pytest.mark.usefixtures("device")

EVEN = tuple((code - 8) / 7 for code in range(16))
LEVELS = TABLES | {"even": EVEN}
CASES = pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS.keys())
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
FEATURES = 13


@triton.jit
def _strip_kernel(
    weights_ptr,
    scales_ptr,
    packed_ptr,
    scale_codes_ptr,
    scale_scales_ptr,
    scale_offset_ptr,
    zeros_ptr,
    scale_map_ptr,
    num_features,
    row_tiles,
    LOOKUP: tl.constexpr,
    BITS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    STRIPS: tl.constexpr,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    BASE: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """One strip of all rows: weights [strips, segments, BLOCK_O, 64], scales [.., BLOCK_O]."""
    feature, column = tl.arange(0, BLOCK_O), tl.arange(0, 64)
    live = feature < num_features
    number = tl.program_id(0)
    tile = feature * row_tiles + number // STRIPS
    weights = strip_weights(
        packed_ptr,
        zeros_ptr,
        tile,
        number % STRIPS,
        column,
        live,
        LOOKUP,
        BITS,
        SEGMENTS,
        GROUP,
        UNIT,
        BASE,
        weights_ptr.dtype.element_ty,
    )
    scales = strip_scales(
        scale_codes_ptr,
        scale_scales_ptr,
        load_offset(scale_codes_ptr, scale_offset_ptr),
        scale_map_ptr,
        feature * (row_tiles * STRIPS) + number,
        live,
        SEGMENTS,
        GROUP,
        UNIT,
    )
    for segment in tl.static_range(SEGMENTS):
        at = (number * SEGMENTS + segment) * BLOCK_O + feature
        tl.store(weights_ptr + at[:, None] * 64 + column[None, :], weights[segment])
        tl.store(scales_ptr + at, scales[segment])


def strips(made: Sample, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Unscaled weights [O, I] in `dtype`, and scales float32 [16, I / 64], as kernels see them."""
    width, bits = made.weights.shape[1], code_bits(made.levels)
    per_strip, per_tile = STRIP_SEGMENTS[bits], TILE_SEGMENTS[bits]
    made_by = decoder(made.levels, dtype, made.scales.zeros is not None)
    device = made.packed.device
    weights = torch.full((width // 64, 16, 64), torch.nan, dtype=dtype, device=device)
    scales = torch.full((width // 64, 16), torch.nan, device=device)
    _strip_kernel[(width // 64 // per_strip,)](
        weights,
        scales,
        made.packed,
        *made.scales,
        dynamic_map(device),
        FEATURES,
        width // 64 // per_tile,
        LOOKUP=made_by.ptx,
        BITS=bits,
        SEGMENTS=per_strip,
        STRIPS=per_tile // per_strip,
        GROUP=made.group_size,
        UNIT=made_by.unit,
        BASE=made_by.base,
        BLOCK_O=16,
    )
    return weights[:, :FEATURES].transpose(0, 1).flatten(1), scales.T


@CASES
@DTYPES
def test_weights_are_the_levels_of_the_codes(dtype: torch.dtype, levels, device) -> None:
    made = sample((FEATURES, 1024), levels).to(device)
    codes = unpack(made.packed, code_bits(levels), FEATURES * 1024).view(FEATURES, 1024)
    unit = decoder(levels, dtype).unit
    table = levels or [code - 128 for code in range(256)]
    # what is multiplied by the unit is exact; a table's levels are rounded once
    right = (torch.tensor(table, dtype=torch.float64, device=device) / unit).to(dtype)
    assert torch.equal(strips(made, dtype)[0], right[codes.long()])


@CASES
@pytest.mark.parametrize("group_size", [64, 128, 512])
def test_scales_are_those_of_the_segments(group_size: int, levels, device) -> None:
    made = sample((FEATURES, 1024), levels, group_size).to(device)
    _, scales = strips(made, torch.bfloat16)
    each = dequantize_scales(made.scales).double().repeat_interleave(group_size // 64)
    right = each.view(FEATURES, 16) * decoder(levels, torch.bfloat16).unit
    torch.testing.assert_close(scales[:FEATURES].double(), right, rtol=3e-7, atol=0)


@CASES
def test_rows_that_do_not_exist_read_no_scale(levels, device) -> None:
    made = sample((FEATURES, 512), levels).to(device)
    # behind the last row lie codes of the greatest scale
    codes = torch.nn.functional.pad(made.scales.codes, (0, 64), value=255)
    _, scales = strips(made._replace(scales=made.scales._replace(codes=codes)), torch.float16)
    nothing = made.scales.offset * decoder(levels, torch.float16).unit
    torch.testing.assert_close(scales[FEATURES:], nothing.expand(3, 8))
    assert (scales[:FEATURES] > 0).all()


@pytest.mark.parametrize("levels", COUNTED.values(), ids=COUNTED.keys())
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@DTYPES
def test_zeros_are_taken_off_before_scaling(dtype, variant, levels, device) -> None:
    made = sample((FEATURES, 512), levels, 128, variant=variant).to(device)
    weights, scales = strips(made, dtype)
    # in units of what is multiplied by the scale
    truth = made.weights / scales[:FEATURES].double().repeat_interleave(64, 1)
    rounding = 0.0 if variant.zeros in (None, "codes") else torch.finfo(dtype).eps / 2
    # the last difference is rounded, and what is less than half a 16th before; scales have an error
    limits = {"rtol": rounding + 3e-7, "atol": rounding / 32 + 1e-9}
    torch.testing.assert_close(weights.double(), truth, **limits)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.zeros != "codes"], ids=str)
def test_bytes_have_zeros_too(variant, device) -> None:
    made = sample((FEATURES, 512), (), variant=variant).to(device)
    weights, scales = strips(made, torch.float16)
    truth = made.weights / scales[:FEATURES].double().repeat_interleave(64, 1)
    torch.testing.assert_close(weights.double(), truth, rtol=2**-11, atol=2**-16)
