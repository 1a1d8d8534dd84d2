"""The protocol: every file in `formats/` keeps it, whichever there are."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import qtune.quant.formats
from qtune.errors import UserError
from qtune.quant.format import Format, Params, format_names, load_format

FILES = sorted(Path(qtune.quant.formats.__path__[0]).glob("[!_]*.py"))
# e8p has no groups: eight weights share a code, a matrix a scale
NAMES = [path.stem for path in FILES if path.stem != "e8p"]
EVERY = pytest.mark.parametrize("name", NAMES)


def random_groups(group_size: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(40, group_size, generator=generator) * torch.rand(40, 1, generator=generator)


def present(params: Params) -> list[Tensor]:
    return [param for param in params if param is not None]


def same(a: Params, b: Params) -> bool:
    pairs = zip(present(a), present(b), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def every_value(fmt: Format, params: Params) -> Tensor:
    """What each code stands for, float64 [S, codes]; INT8 does not use its lowest."""
    codes = torch.arange(2**fmt.bits, dtype=torch.uint8)[int(fmt.bits == 8) :]
    return fmt.decode(codes.repeat(len(params.scales), 1), params).double()


def test_names_are_the_files() -> None:
    assert format_names() == [path.stem for path in FILES]
    assert {"nf4", "fp4", "int8", "int4", "int3", "int2", "lm4", "lm3", "lm2", "ternary"} <= set(
        NAMES
    )


@pytest.mark.parametrize("name", ["nf5", "", "NF4", "__init__", "../formats/nf4"])
def test_unknown_name_lists_the_known(name: str) -> None:
    with pytest.raises(UserError, match=r"unknown format .*int8, .*nf4"):
        load_format(name)


@EVERY
@pytest.mark.parametrize("group_size", [16, 64, 100])
def test_shapes_and_dtypes(name: str, group_size: int) -> None:
    fmt = load_format(name)
    groups = random_groups(group_size).view(4, 10, group_size)
    params = fmt.fit(groups)
    assert (params.zeros is None) == (fmt.zero_kind is None)
    for param in present(params):
        assert (param.shape, param.dtype) == ((4, 10), torch.float32)
    codes = fmt.encode(groups, params)
    assert (codes.shape, codes.dtype) == (groups.shape, torch.uint8)
    assert int(codes.max()) < 2**fmt.bits
    back = fmt.decode(codes, params)
    assert (back.shape, back.dtype) == (groups.shape, torch.float32)


@EVERY
def test_nothing_is_written_in_place(name: str) -> None:
    fmt, groups = load_format(name), random_groups()
    before, params = groups.clone(), fmt.fit(groups)
    kept = Params(*(None if p is None else p.clone() for p in params))
    codes = fmt.encode(groups, params)
    same_codes = codes.clone()
    fmt.decode(codes, params)
    assert torch.equal(groups, before) and torch.equal(codes, same_codes) and same(params, kept)


@EVERY
@pytest.mark.parametrize("zero", [None, 1.0, -0.37])
def test_decoding_is_what_the_kernels_do_with_a_code(name: str, zero: float | None) -> None:
    fmt = load_format(name)
    codes = torch.arange(2**fmt.bits, dtype=torch.uint8).unsqueeze(0)
    values = codes[0].double() - 128
    if fmt.levels:
        assert len(fmt.levels) == 2**fmt.bits
        values = torch.tensor(fmt.levels, dtype=torch.float64)
    scale = torch.tensor([0.73])
    params = Params(scale, None if zero is None else torch.tensor([zero]))
    exact = (values - (zero or 0)) * scale.double()
    assert torch.allclose(fmt.decode(codes, params).double(), exact, rtol=1e-6, atol=1e-7)


@EVERY
@pytest.mark.parametrize("keep", [1.0, 0.7])
def test_encoding_again_changes_nothing(name: str, keep: float) -> None:
    fmt, groups = load_format(name), random_groups()
    params = fmt.fit(groups, keep)
    back = fmt.decode(fmt.encode(groups, params), params)
    assert torch.equal(fmt.decode(fmt.encode(back, params), params), back)


@EVERY
@pytest.mark.parametrize("keep", [1.0, 0.7])
def test_no_other_code_is_nearer(name: str, keep: float) -> None:
    fmt, groups = load_format(name), random_groups()
    params = fmt.fit(groups, keep)
    values = every_value(fmt, params)
    distance = (values.unsqueeze(1) - groups.double().unsqueeze(2)).abs().amin(2)
    chosen = (fmt.decode(fmt.encode(groups, params), params).double() - groups.double()).abs()
    assert (chosen <= distance + 1e-6 * groups.abs().amax(1, keepdim=True)).all()


@EVERY
def test_zero_group_decodes_to_zeros(name: str) -> None:
    fmt = load_format(name)
    groups = torch.zeros(2, 64)
    params = fmt.fit(groups)
    codes = fmt.encode(groups, params)
    assert not fmt.decode(codes, params).any()
    # stored in 8 bits, a scale of zero need not stay zero
    for scale in (0.01, -0.01):
        back = fmt.decode(codes, params._replace(scales=torch.full((2,), scale)))
        smallest = 0 if fmt.zero_kind or not fmt.levels else min(abs(x) for x in fmt.levels)
        assert back.abs().max() <= smallest * 0.01 + 1e-9


@EVERY
@pytest.mark.parametrize("value", [0.7, -0.7])
def test_constant_group(name: str, value: float) -> None:
    fmt = load_format(name)
    groups = torch.full((1, 64), value)
    params = fmt.fit(groups)
    back = fmt.decode(fmt.encode(groups, params), params)
    # code books need not have a level at the end of their range
    within = 0.42 if name.startswith("lm") else 1e-6
    assert torch.allclose(back, groups, rtol=within, atol=0)


@EVERY
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e6, 1e30])
def test_size_does_not_matter(name: str, size: float) -> None:
    fmt, groups = load_format(name), random_groups()
    params, scaled = fmt.fit(groups), fmt.fit(groups * size)
    plain = fmt.decode(fmt.encode(groups, params), params)
    back = fmt.decode(fmt.encode(groups * size, scaled), scaled) / size
    # where rounding moves a value across a boundary, it is one level off
    assert ((back - plain).abs() > 1e-5).sum() <= 3


@EVERY
def test_on_meta(name: str) -> None:
    fmt = load_format(name)
    groups = torch.empty(5, 64, device="meta")
    params = fmt.fit(groups)
    codes = fmt.encode(groups, params)
    back = fmt.decode(codes, params)
    assert {t.device.type for t in (*present(params), codes, back)} == {"meta"}
    assert (params.scales.shape, codes.shape, back.shape) == ((5,), (5, 64), (5, 64))
    assert codes.dtype == torch.uint8
