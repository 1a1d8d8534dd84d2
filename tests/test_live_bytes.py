import pytest
import torch
from torch.utils.checkpoint import checkpoint

from qtune.live_bytes import LiveBytes

SIZE = 1000 * 4


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_autograd_keeps_and_what_it_gives_back(device):
    x = torch.ones(1000, device=device, requires_grad=True)
    with LiveBytes() as live:
        y = (2 * x).exp()
        # 2 x is gone, exp keeps its result
        assert (live.now, live.peak) == (SIZE, 2 * SIZE)
        loss = (y * y).sum()
        del y
        assert (live.now, live.peak) == (SIZE + 4, 2 * SIZE + 4)
        loss.backward()
        del loss
        assert live.now == x.grad.nbytes == SIZE
        x.grad = None
    assert live.now == 0


def test_views_are_their_storage():
    with LiveBytes() as live:
        x = torch.zeros(10, 100)
        parts = x.split(3)
        rows = [x[i] for i in range(10)]
        assert live.now == live.peak == x.nbytes
        del x, parts
        assert live.now == SIZE
        del rows
        assert live.now == 0


def test_what_is_there_already_and_its_views_are_ignored():
    weight = torch.zeros(10, 100)
    with LiveBytes([weight]) as live:
        kept = [weight.T, weight.detach(), weight.add_(1)]
        assert live.now == live.peak == 0
        kept.append(weight + 1)
        assert live.now == weight.nbytes


def test_storages_that_take_the_place_of_others_count_again():
    with LiveBytes() as live:
        for _ in range(100):
            x = torch.ones(1000)
            assert live.now == SIZE
            del x
        assert (live.now, live.peak) == (0, SIZE)


def test_checkpoints_are_seen():
    """What closures and caches hold is no saved tensor of autograd and counts all the same."""
    x = torch.ones(1000, requires_grad=True)
    with LiveBytes() as live:
        y = checkpoint(lambda x, shift: (x + shift).exp().sin(), x, 2 * x, use_reentrant=False)
        # the result, and the shift that the block is run with again
        assert live.now == 2 * SIZE
        before = live.peak
        y.sum().backward()
        assert live.peak > before
