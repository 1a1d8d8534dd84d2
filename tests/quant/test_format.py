"""The protocol: every file in `formats/` keeps it, whichever there are."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import qtune.quant.formats
from qtune.errors import UserError
from qtune.quant.format import format_names, load_format

FILES = sorted(Path(qtune.quant.formats.__path__[0]).glob("[!_]*.py"))
NAMES = [path.stem for path in FILES]


def random_groups(group_size: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(40, group_size, generator=generator) * torch.rand(40, 1, generator=generator)


def test_names_are_the_files() -> None:
    assert format_names() == NAMES
    assert {"nf4", "int8"} <= set(NAMES)


@pytest.mark.parametrize("name", ["nf5", "", "NF4", "__init__", "../formats/nf4"])
def test_unknown_name_lists_the_known(name: str) -> None:
    with pytest.raises(UserError, match=r"unknown format .*int8, nf4"):
        load_format(name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("group_size", [16, 64, 100])
def test_shapes_and_dtypes(name: str, group_size: int) -> None:
    fmt = load_format(name)
    groups = random_groups(group_size).view(4, 10, group_size)
    scales = fmt.fit(groups)
    assert (scales.shape, scales.dtype) == ((4, 10), torch.float32)
    codes = fmt.encode(groups, scales)
    assert (codes.shape, codes.dtype) == (groups.shape, torch.uint8)
    assert int(codes.max()) < 2**fmt.bits
    back = fmt.decode(codes, scales)
    assert (back.shape, back.dtype) == (groups.shape, torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_written_in_place(name: str) -> None:
    fmt, groups = load_format(name), random_groups()
    before, scales = groups.clone(), fmt.fit(groups)
    codes = fmt.encode(groups, scales)
    kept = codes.clone(), scales.clone()
    fmt.decode(codes, scales)
    assert torch.equal(groups, before)
    assert torch.equal(codes, kept[0]) and torch.equal(scales, kept[1])


@pytest.mark.parametrize("name", NAMES)
def test_decoding_is_what_the_kernels_do_with_a_code(name: str) -> None:
    fmt = load_format(name)
    codes = torch.arange(2**fmt.bits, dtype=torch.uint8).unsqueeze(0)
    if fmt.levels:
        assert len(fmt.levels) == 2**fmt.bits
        values = torch.tensor(fmt.levels, dtype=torch.float64)
    else:
        values = (codes[0].double() - 128) / 127
    scale = torch.tensor([0.73])
    assert torch.allclose(fmt.decode(codes, scale).double(), values * scale.double(), rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_encoding_again_changes_nothing(name: str) -> None:
    fmt, groups = load_format(name), random_groups()
    scales = fmt.fit(groups)
    codes = fmt.encode(groups, scales)
    back = fmt.decode(codes, scales)
    assert torch.equal(fmt.encode(back, scales), codes)
    # the largest magnitude survives but for the last bit, and so do codes for a scale fitted anew
    assert torch.allclose(fmt.fit(back), scales, rtol=1e-6)
    assert torch.equal(fmt.encode(back, fmt.fit(back)), codes)


@pytest.mark.parametrize("name", NAMES)
def test_no_other_code_is_nearer(name: str) -> None:
    fmt, groups = load_format(name), random_groups()
    scales = fmt.fit(groups)
    codes = torch.arange(2**fmt.bits, dtype=torch.uint8).repeat(len(groups), 1)
    values = fmt.decode(codes, scales).double()  # [S, codes]
    distance = (values.unsqueeze(1) - groups.double().unsqueeze(2)).abs().amin(2)
    chosen = (fmt.decode(fmt.encode(groups, scales), scales).double() - groups.double()).abs()
    assert (chosen <= distance + 1e-6 * scales.unsqueeze(1)).all()


@pytest.mark.parametrize("name", NAMES)
def test_zero_group_decodes_to_zeros(name: str) -> None:
    fmt = load_format(name)
    groups = torch.zeros(2, 64)
    codes = fmt.encode(groups, fmt.fit(groups))
    # with another scale too: stored in 8 bits, a scale of zero need not stay zero
    for scale in (0.0, 0.01, -0.01):
        assert not fmt.decode(codes, torch.full((2,), scale)).any()


@pytest.mark.parametrize("name", NAMES)
def test_on_meta(name: str) -> None:
    fmt = load_format(name)
    groups = torch.empty(5, 64, device="meta")
    scales = fmt.fit(groups)
    codes = fmt.encode(groups, scales)
    back = fmt.decode(codes, scales)
    assert {t.device.type for t in (scales, codes, back)} == {"meta"}
    assert (scales.shape, codes.shape, back.shape) == ((5,), (5, 64), (5, 64))
    assert codes.dtype == torch.uint8
