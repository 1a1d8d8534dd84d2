"""Memory of this machine: what is free, the most that was taken, and what the process keeps."""

import ctypes
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch

CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")
CGROUP = Path("/sys/fs/cgroup")
# parameters of glibc's mallopt and, in bytes, their defaults
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
DEFAULT_THRESHOLD = 128 << 10
# the most that mallopt takes: larger blocks are mapped, and given back when they are freed
LARGEST_KEPT = 32 << 20
NEVER = -1


class Peak:
    """Most memory taken since this was made, in bytes: allocated on a GPU, resident on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif CLEAR_REFS.exists():
            # 5 resets the high-water mark of the resident memory; not every sandbox has it
            with suppress(OSError):
                CLEAR_REFS.write_text("5")
        self._before = 0 if device.type == "cuda" else psutil.Process().memory_info().rss

    def bytes(self) -> int:
        """The peak so far."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        # the two counters differ by a few pages
        return max(0, _most_resident() - self._before)


@contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """Meanwhile memory on the CPU that is freed stays with the process, for the next step to use.

    A step frees nearly all it has allocated. glibc would give that back to the system, which maps
    and clears it anew page by page. Other C libraries are left as they are.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        yield
        return
    libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
    libc.mallopt(M_TRIM_THRESHOLD, NEVER)
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_THRESHOLD, DEFAULT_THRESHOLD)
        libc.mallopt(M_TRIM_THRESHOLD, DEFAULT_THRESHOLD)
        libc.malloc_trim(0)


def available_bytes(device: torch.device) -> int:
    """Memory that a run may take on the device now, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    # processes beside this one on the machine need as much
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return int(min(psutil.virtual_memory().available, _container_bytes())) // num_processes


def _most_resident() -> int:
    """High-water mark of the resident memory in bytes; what is resident now where none is kept."""
    lines = STATUS.read_text().splitlines() if STATUS.exists() else []
    for line in lines:
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return int(psutil.Process().memory_info().rss)


def _container_bytes() -> float:
    """What the container's limit leaves, in bytes; file caches are given back when needed."""
    if not (CGROUP / "memory.max").is_file():
        return math.inf
    limit = (CGROUP / "memory.max").read_text().strip()
    if limit == "max":
        return math.inf
    stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    used = int((CGROUP / "memory.current").read_text()) - int(stat["inactive_file"])
    return int(limit) - used
