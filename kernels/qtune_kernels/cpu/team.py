"""Work shared over the threads that PyTorch already has.

A second pool of threads would fight the first one: OpenMP's threads stay awake for a while after
each parallel region, waiting for the next. So kernels run as regions of the same OpenMP library
that PyTorch has loaded. Where that cannot be found, they run on the calling thread.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch

MAPS = Path("/proc/self/maps")


@cache
def openmp() -> ctypes.CDLL | None:
    """PyTorch's OpenMP library, or None where there is none with GNU's entry points."""
    # the library is mapped once something has run in parallel
    torch.zeros(1)
    if not MAPS.exists():
        return None
    paths = {line.split()[-1] for line in MAPS.read_text().splitlines() if "omp" in line}
    for path in sorted(paths, key=lambda path: "torch" not in path):
        if Path(path).name.startswith(("libgomp", "libiomp5", "libomp")):
            library = ctypes.CDLL(path)
            if hasattr(library, "GOMP_parallel"):
                words, count = (ctypes.c_char_p, ctypes.c_uint)
                library.GOMP_parallel.argtypes = (ctypes.c_void_p, words, count, count)
                return library
    return None


def num_workers() -> int:
    """How many threads a kernel is shared over."""
    return torch.get_num_threads() if openmp() else 1


def run(function: int, words: bytes, workers: int) -> None:
    """Call a compiled kernel, given by its address, on `workers` threads and wait for all.

    `words` are its arguments, 64 bits each.
    """
    library = openmp()
    if library is None or workers == 1:
        _callable(function)(words)
    else:
        library.GOMP_parallel(function, words, workers, 0)


@cache
def _callable(function: int) -> "ctypes._FuncPointer":
    return ctypes.CFUNCTYPE(None, ctypes.c_char_p)(function)
