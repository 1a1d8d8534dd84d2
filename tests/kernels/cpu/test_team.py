"""The threads kernels run on are PyTorch's."""

import struct
import threading

import pytest
import torch

from qtune_kernels.cpu import team
from qtune_kernels.cpu.jit import KernelCode, Pointer, available, kernel

pytestmark = pytest.mark.skipif(not available(), reason="no kernels for this processor")


@kernel
def _number(code: KernelCode, out: Pointer) -> None:
    code.store(code.worker + 1, out + code.worker * 8)


def numbers(threads: int) -> list[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    out = torch.zeros(4, dtype=torch.int64)
    _number(out.data_ptr())
    torch.set_num_threads(before)
    return out.tolist()


def test_a_kernel_runs_once_on_each_thread() -> None:
    assert numbers(1) == [1, 0, 0, 0]
    assert numbers(2) == [1, 2, 0, 0]


def test_other_threads_than_the_main_one_may_call() -> None:
    found = []
    thread = threading.Thread(target=lambda: found.append(numbers(2)))
    thread.start()
    thread.join()
    assert found == [[1, 2, 0, 0]]


def test_the_library_is_the_one_that_torch_has_loaded() -> None:
    library = team.openmp()
    if library is None:
        pytest.skip("this build of PyTorch has no OpenMP with GNU's entry points")
    torch.set_num_threads(before := torch.get_num_threads())
    assert library.omp_get_max_threads() == before


def test_without_openmp_one_thread_does_it_all(monkeypatch) -> None:
    monkeypatch.setattr(team, "openmp", lambda: None)
    assert team.num_workers() == 1
    out = torch.zeros(4, dtype=torch.int64)
    team.run(_number.address(), struct.pack("qq", out.data_ptr(), 1), 1)
    assert out.tolist() == [1, 0, 0, 0]
