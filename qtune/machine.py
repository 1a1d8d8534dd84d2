"""Memory of this machine: what is free now, and the most that was taken since some moment."""

import math
import os
from contextlib import suppress
from pathlib import Path

import psutil
import torch

CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")
CGROUP = Path("/sys/fs/cgroup")


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
