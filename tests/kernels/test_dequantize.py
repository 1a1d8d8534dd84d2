from collections.abc import Iterator

import pytest
import torch
from samples import COUNTED, TABLES, VARIANTS, Sample, Variant, error, sample

from qtune_kernels.dequantize import dequantize, plain_into, stored_weights
from qtune_kernels.packing import from_bitsandbytes, to_bitsandbytes
from qtune_kernels.scales import Scales

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# a single weight, less than a run, a broken last run, whole runs, more than the CPU does at a time
SHAPES = [(1, 1), (7, 5), (13, 129), (6, 256), (1100, 512)]


def decode(made: Sample, dtype: torch.dtype) -> torch.Tensor:
    shape = made.weights.shape
    return dequantize(made.packed, *made.scales, made.levels, made.group_size, *shape, dtype)


@pytest.fixture
def nothing_is_compiled() -> Iterator[None]:
    # bitsandbytes compiles its generic CPU path, which takes minutes
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("levels", TABLES.values(), ids=TABLES.keys())
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group_size", [16, 64, 256])
def test_float32_weights_are_levels_times_scales(shape, levels, group_size) -> None:
    made = sample(shape, levels, group_size)
    assert decode(made, torch.float32).shape == shape
    torch.testing.assert_close(
        decode(made, torch.float32).double(), made.weights, rtol=2e-7, atol=0
    )


@pytest.mark.parametrize("levels", TABLES.values(), ids=TABLES.keys())
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group_size", [16, 64, 256])
def test_plain_pytorch_needs_no_kernel_for_the_processor(shape, levels, group_size) -> None:
    made = sample(shape, levels, group_size)
    flat = torch.full((stored_weights(made.packed, levels),), torch.nan)
    plain_into(flat, made.packed, made.scales, levels, group_size)
    weights = flat[: made.weights.numel()].view(shape)
    torch.testing.assert_close(weights.double(), made.weights, rtol=2e-7, atol=0)


def is_stored(variant: Variant, levels: tuple[float, ...]) -> bool:
    """Whether there is such a thing: whole zeros of bytes are not."""
    return bool(levels) or variant.zeros != "codes"


EVERY = COUNTED | {"8 bits": (), "nf4": TABLES["nf4"]}
CASES = [
    pytest.param(levels, variant, id=f"{name}, {variant}")
    for name, levels in EVERY.items()
    for variant in VARIANTS
    if is_stored(variant, levels)
]


@pytest.mark.parametrize(("levels", "variant"), CASES)
@pytest.mark.parametrize("group_size", [64, 16, 100, 13 * 200])
def test_zeros_are_taken_off_before_scaling(group_size, levels, variant) -> None:
    made = sample((13, 200), levels, group_size, variant=variant)
    for plain in (False, True):
        flat = torch.full((stored_weights(made.packed, levels),), torch.nan)
        if plain:
            plain_into(flat, made.packed, made.scales, levels, group_size)
            weights = flat[: made.weights.numel()].view(13, 200)
        else:
            weights = decode(made, torch.float32)
        # a difference and a product, rounded once each
        torch.testing.assert_close(weights.double(), made.weights, rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize(("levels", "variant"), CASES)
def test_plain_pytorch_gives_the_bits_that_the_op_gives(levels, variant) -> None:
    made = sample((130, 200), levels, variant=variant)
    for dtype in DTYPES:
        flat = torch.empty(stored_weights(made.packed, levels), dtype=dtype)
        plain_into(flat, made.packed, made.scales, levels, 64)
        assert torch.equal(flat[: made.weights.numel()].view(130, 200), decode(made, dtype))


@pytest.mark.parametrize("levels", [TABLES["nf4"], TABLES["3 bits"], ()], ids=["4", "3", "8"])
@pytest.mark.parametrize("group_size", [1, 24, 100, 576, 40_000, 70 * 1000])
def test_groups_may_be_of_any_size(group_size: int, levels) -> None:
    made = sample((70, 1000), levels, group_size)
    weights = decode(made, torch.float32)
    torch.testing.assert_close(weights.double(), made.weights, rtol=2e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("levels", TABLES.values(), ids=TABLES.keys())
def test_16_bit_weights_are_the_float32_ones_rounded(levels, dtype) -> None:
    made = sample((13, 200), levels, 32)
    assert torch.equal(decode(made, dtype), decode(made, torch.float32).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(96, 64), (17, 192), (128, 576)])
def test_bitsandbytes_decodes_the_same_bits(shape, dtype, nothing_is_compiled) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    weight = torch.randn(shape).to(dtype)
    packed, state = functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    scales = Scales(state.absmax, state.state2.absmax, state.offset.view(1))
    levels = state.code.tolist()
    storage = from_bitsandbytes(packed, weight.numel())
    ours = dequantize(storage, *scales, levels, 64, *shape, dtype)
    assert torch.equal(ours, functional.dequantize_4bit(packed, state))
    assert torch.equal(to_bitsandbytes(storage, weight.numel()), packed)


def test_calls_do_not_share_their_result() -> None:
    first, second = sample((4, 128), seed=1), sample((4, 128), seed=2)
    kept = decode(first, torch.float32)
    decode(second, torch.float32)
    assert error(kept, first.weights) < 1e-6


def test_inference_mode_leaves_no_trace() -> None:
    made = sample((5, 300))
    with torch.inference_mode():
        decode(made, torch.float32)
    assert error(decode(made, torch.float32), made.weights) < 1e-6


@pytest.mark.parametrize("levels", TABLES.values(), ids=TABLES.keys())
def test_the_op_keeps_the_rules_of_torch(levels) -> None:
    for variant in (Variant(), Variant("half", "half")):
        made = sample((6, 128), levels, variant=variant)
        arguments = (made.packed, *made.scales, list(levels), 64, 6, 128, torch.bfloat16)
        torch.library.opcheck(dequantize, arguments)


def test_meta_tensors_have_the_same_shape() -> None:
    made = sample((6, 100)).to(torch.device("meta"))
    weights = decode(made, torch.float16)
    assert weights.shape == (6, 100) and weights.dtype == torch.float16 and weights.is_meta
