"""Scales and codes against float64 arithmetic and bitsandbytes."""

from collections.abc import Iterator

import pytest
import torch
from samples import COUNTED, NF4, TABLES

from qtune_kernels import quantize as module
from qtune_kernels.nearest import cells_of
from qtune_kernels.packing import code_bits, packed_bytes, to_bitsandbytes, unpack
from qtune_kernels.quantize import absmax, encode, plain_encode

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
EVERY = pytest.mark.parametrize("levels", TABLES.values(), ids=TABLES.keys())
# a single weight, broken groups and runs, whole ones, several slices
SHAPES = [(1, 1), (7, 33), (13, 520), (16, 512), (3, module.SLICE // 2 + 77)]


@pytest.fixture
def nothing_is_compiled() -> Iterator[None]:
    # bitsandbytes compiles its generic CPU path, which takes minutes
    with torch.compiler.set_stance("force_eager"):
        yield


def random_weight(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(shape) * (torch.rand(shape[0], 1) + 0.01)).to(dtype)


def values(levels: tuple[float, ...]) -> torch.Tensor:
    """What codes stand for, float64; of code 0 with 8 bits, which nothing is encoded to, NaN."""
    if levels:
        return torch.tensor(levels, dtype=torch.float64)
    return torch.cat([torch.tensor([torch.nan]), torch.arange(-127, 128)]).double()


def by_groups(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    flat = weight.double().flatten()
    return torch.nn.functional.pad(flat, (0, -flat.numel() % group_size)).view(-1, group_size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group_size", [16, 64, 100, 1024, module.SLICE + 100])
def test_a_scale_is_the_largest_magnitude(shape, group_size, dtype) -> None:
    weight = random_weight(shape, dtype)
    scales = absmax(weight, group_size)
    assert scales.dtype == torch.float32
    assert torch.equal(scales, by_groups(weight, group_size).abs().amax(1).float())


@EVERY
@pytest.mark.parametrize("shape", SHAPES[:4])
@pytest.mark.parametrize("group_size", [16, 64, 100, 1024])
def test_no_other_level_is_nearer(shape, group_size, levels) -> None:
    weight = random_weight(shape)
    scales = absmax(weight, group_size)
    packed = plain_encode(weight, scales, None, levels, group_size)
    assert packed.numel() == packed_bytes(weight.numel(), code_bits(levels))
    codes = unpack(packed, code_bits(levels), weight.numel()).long()
    own = scales.double().repeat_interleave(group_size)[: weight.numel()]
    ratios = weight.double().flatten() / own
    nearest = (values(levels) - ratios.unsqueeze(1)).abs().nan_to_num(9).amin(1)
    assert ((values(levels)[codes] - ratios).abs() <= nearest + 1e-6).all()


@pytest.mark.parametrize("levels", [*COUNTED.values(), ()], ids=[*COUNTED, "8 bits"])
@pytest.mark.parametrize("group_size", [16, 64, 100, 1024])
def test_no_other_level_is_nearer_to_the_ratio_plus_the_zero_point(group_size, levels) -> None:
    weight = random_weight((13, 520))
    scales = absmax(weight, group_size) / (2 if levels else 200)
    zeros = torch.rand(len(scales)) * 3
    packed = plain_encode(weight, scales, zeros, levels, group_size)
    codes = unpack(packed, code_bits(levels), weight.numel()).long()
    own, zero = (
        part.double().repeat_interleave(group_size)[: weight.numel()] for part in (scales, zeros)
    )
    ratios = weight.double().flatten() / own + zero
    nearest = (values(levels) - ratios.unsqueeze(1)).abs().nan_to_num(1e9).amin(1)
    assert ((values(levels)[codes] - ratios).abs() <= nearest + 1e-5).all()


@EVERY
def test_slices_leave_no_seams(levels, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight((50, 77))
    for group_size in (64, 100):
        scales = absmax(weight, group_size)
        whole = plain_encode(weight, scales, None, levels, group_size)
        with monkeypatch.context() as patch:
            patch.setattr(module, "SLICE", 512)
            assert torch.equal(absmax(weight, group_size), scales)
            assert torch.equal(plain_encode(weight, scales, None, levels, group_size), whole)


@EVERY
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("zeros", [False, True], ids=["no zeros", "zeros"])
def test_plain_pytorch_gives_the_bytes_that_the_op_gives(zeros: bool, dtype, levels) -> None:
    weight = random_weight((33, 130)).to(dtype)
    for group_size in (64, 100):
        scales = absmax(weight, group_size)
        shifts = torch.rand(len(scales)) if zeros else None
        arguments = weight, scales, shifts, levels, group_size
        assert torch.equal(plain_encode(*arguments), encode(*arguments))


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(64, 192), (33, 65), (3, 7), (1, 1)])
def test_bitsandbytes_packs_the_same_codes(shape, kind, dtype, nothing_is_compiled) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    weight = random_weight(shape, dtype)
    theirs, state = functional.quantize_4bit(weight, blocksize=64, quant_type=kind)
    levels = state.code.tolist()
    scales = absmax(weight, 64)
    assert torch.equal(scales, state.absmax)
    ours = encode(weight, scales, None, levels, 64)
    zero_code = levels.index(0.0)
    assert torch.equal(to_bitsandbytes(ours, weight.numel(), zero_code), theirs)


@pytest.mark.parametrize("name", ["nf4", "3 bits", "2 bits"])
def test_halfway_ratios_take_the_lower_level(name: str) -> None:
    ascending = torch.tensor(TABLES[name]).sort().values
    halfway = (ascending[:-1] + ascending[1:]) / 2
    weight = torch.cat([halfway, torch.ones(1)])
    codes = unpack(
        encode(weight, torch.ones(1), None, TABLES[name], 64), code_bits(TABLES[name]), 16
    )
    chosen = torch.tensor(TABLES[name])[codes[: len(halfway)].long()]
    assert torch.equal(chosen, ascending[:-1])


def test_levels_beyond_one_are_reached() -> None:
    levels = (-2.0, -0.5, 0.5, 1.5)
    weight = torch.tensor([-1.9, -1.0, 0.0, 0.2, 1.0, 5.0, -9.0])
    codes = unpack(encode(weight, torch.ones(1), None, levels, 64), 2, 7)
    assert codes.tolist() == [0, 1, 1, 2, 2, 3, 0]


@EVERY
def test_weights_may_be_strided(levels) -> None:
    weight = random_weight((48, 130)).t()[1:, 3:]
    scales = absmax(weight, 64)
    assert torch.equal(scales, absmax(weight.contiguous(), 64))
    packed = encode(weight.contiguous(), scales, None, levels, 64)
    assert torch.equal(encode(weight, scales, None, levels, 64), packed)


@EVERY
def test_the_weight_stays_as_it_is(levels) -> None:
    weight = random_weight((4, 64))
    before = weight.clone()
    encode(weight, absmax(weight, 64), None, levels, 64)
    assert torch.equal(weight, before)


def test_a_negative_scale_turns_the_levels_around() -> None:
    levels = TABLES["2 bits"]
    weight = random_weight((1, 64))
    scales = absmax(weight, 64)
    assert torch.equal(
        encode(weight, -scales, None, levels, 64), encode(-weight, scales, None, levels, 64)
    )


@EVERY
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_an_error(bad: float, levels) -> None:
    weight = random_weight((4, 64))
    weight[2, 3] = bad
    with pytest.raises(ValueError, match="not finite"):
        encode(weight, absmax(weight, 64), None, levels, 64)


@EVERY
def test_meta_tensors_have_the_same_shapes(levels) -> None:
    weight = torch.empty(5, 100, device="meta")
    scales = absmax(weight, 64)
    assert scales.shape == (8,) and scales.is_meta
    packed = encode(weight, scales, None, levels, 64)
    assert packed.shape == (packed_bytes(500, code_bits(levels)),) and packed.is_meta


@EVERY
def test_the_ops_keep_the_rules_of_torch(levels) -> None:
    weight = random_weight((6, 100), torch.bfloat16)
    torch.library.opcheck(absmax, (weight, 64))
    scales = absmax(weight, 64)
    torch.library.opcheck(encode, (weight, scales, None, list(levels), 64))
    torch.library.opcheck(encode, (weight, scales, torch.ones_like(scales), list(levels), 64))


def test_inference_mode_leaves_no_trace() -> None:
    weight = random_weight((5, 300))
    cells_of.cache_clear()
    with torch.inference_mode():
        first = encode(weight, absmax(weight, 64), None, NF4, 64)
    assert torch.equal(encode(weight, absmax(weight, 64), None, NF4, 64), first)
