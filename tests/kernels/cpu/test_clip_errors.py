"""The kernel of `clip_errors`; its results are tested in tests/kernels/test_clip_errors.py."""

import pytest
import torch
from samples import NF4

from qtune_kernels.cpu.clip_errors import clip_errors, takes
from qtune_kernels.cpu.jit import available

pytestmark = pytest.mark.skipif(not available(), reason="no kernels for this processor")


def test_what_lies_apart_is_read_rightly() -> None:
    groups, scales, zeros = torch.randn(64, 9).T, torch.rand(9, 3).T + 1, torch.rand(9, 3).T
    importance = torch.rand(64, 9).T
    truth = clip_errors(*(x.contiguous() for x in (groups, scales, zeros)), NF4, importance.clone())
    assert torch.equal(clip_errors(groups, scales, zeros, NF4, importance), truth)


def test_threads_share_the_groups() -> None:
    groups, scales, before = torch.randn(50, 64), torch.rand(5, 50), torch.get_num_threads()
    alone = clip_errors(groups, scales, None, NF4, None)
    torch.set_num_threads(3)
    together = clip_errors(groups, scales, None, NF4, None)
    torch.set_num_threads(before)
    assert torch.equal(alone, together)


def test_what_is_taken() -> None:
    assert takes(torch.empty(2, 64))
    assert not takes(torch.empty(2, 64, dtype=torch.bfloat16))
    assert not takes(torch.empty(2, 64, device="meta"))
