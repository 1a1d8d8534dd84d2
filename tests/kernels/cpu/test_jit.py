"""Kernels as callables: arguments, specialization, and the division of work."""

import pytest
import torch

from qtune_kernels.cpu import jit
from qtune_kernels.cpu.jit import Integer, KernelCode, Number, Pointer, available, kernel
from qtune_kernels.cpu.simd import F32

pytestmark = pytest.mark.skipif(not available(), reason="no kernels for this processor")


@kernel
def _count(code: KernelCode, visits: Pointer, workers: Pointer, count: Integer) -> None:
    """Which thread visits which index."""
    code.store(code.workers, workers)
    with code.share(count) as index:
        code.store(code.worker + 1, visits + index * 8)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 1000])
def test_every_index_is_visited_once_and_neighbours_by_one_thread(threads, count) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    visits, workers = torch.zeros(count, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    _count(visits.data_ptr(), workers.data_ptr(), count)
    torch.set_num_threads(before)
    assert workers.item() == threads
    assert (visits > 0).all() and (visits.diff() >= 0).all()
    sizes = visits.unique(return_counts=True)[1].tolist()
    assert not sizes or count < threads or max(sizes) - min(sizes) <= 1


@kernel
def _store(code: KernelCode, out: Pointer, number: Number, *, times: int) -> None:
    code.store(number * float(times), out)


def test_numbers_are_floats_and_fixed_parameters_specialize() -> None:
    out = torch.zeros(1)
    for times in (2, 3, 2):
        _store(out.data_ptr(), 0.1, times=times)
        assert out.item() == torch.tensor(0.1).mul(times).item()
    assert _store.address(times=2) != _store.address(times=3)
    assert _store.address(times=2) == _store.address(times=2)


def test_a_kernel_keeps_its_documentation_and_shows_its_instructions() -> None:
    assert _count.__doc__ == "Which thread visits which index." and _count.__name__ == "_count"
    assert "fmul float" in _store.text(times=5)


def test_machine_code_is_for_this_processor() -> None:
    assert "avx512f" in jit.features()
    assert F32.intrinsic_name == "f32"
