"""E8P as a format: Gaussian weights lose what is published, and codes decode as words do."""

import pytest
import torch

from qtune.quant.format import load_format
from qtune_kernels.e8p_book import LENGTH, STEP, decode_words, nearest_words

E8P = load_format("e8p")


def test_normal_weights_lose_92_thousandths_at_2_bits() -> None:
    # shared/QUALITY.md 3.2; plain 2-bit grids lose .118 to .208
    groups = torch.randn(16, 4096) * torch.rand(16, 1)
    params = E8P.fit(groups)
    back = E8P.decode(E8P.encode(groups, params), params)
    assert (back - groups).square().sum() / groups.square().sum() == pytest.approx(0.092, abs=2e-3)
    assert E8P.bits == 2


def test_codes_are_the_numbers_of_the_nearest_points() -> None:
    groups = torch.randn(3, 4, 64)
    params = E8P.fit(groups)
    codes = E8P.encode(groups, params)
    assert (codes.shape, codes.dtype) == (groups.shape, torch.uint8)
    scaled = (groups / params.scales.unsqueeze(-1)).view(-1, LENGTH)
    steps = decode_words(nearest_words(scaled)).view(groups.shape)
    assert torch.equal(torch.tensor(E8P.levels)[codes.long()], steps * STEP)
    expected = steps * STEP * params.scales.unsqueeze(-1)
    torch.testing.assert_close(E8P.decode(codes, params), expected)


def test_a_smaller_share_of_the_range_makes_a_smaller_scale() -> None:
    groups = torch.randn(3, 64)
    torch.testing.assert_close(E8P.fit(groups, 0.5).scales, E8P.fit(groups).scales / 2)


def test_zeros_become_next_to_nothing() -> None:
    groups = torch.zeros(2, 64)
    params = E8P.fit(groups)
    back = E8P.decode(E8P.encode(groups, params), params)
    assert back.isfinite().all() and back.abs().max() < 1e-11


def test_meta_tensors_have_the_same_shapes() -> None:
    groups = torch.empty(2, 64, device="meta")
    params = E8P.fit(groups)
    codes = E8P.encode(groups, params)
    assert (codes.shape, codes.dtype) == ((2, 64), torch.uint8)
    assert E8P.decode(codes, params).shape == (2, 64)
