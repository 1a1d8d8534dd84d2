"""What this machine has and what of qtune works on it: the lines of `qtune doctor`.

Versions are read from package metadata; only torch is imported, and only when asked. A line is not
ok when something that qtune needs here is missing, too old or unreachable; its value then says what
to do.
"""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.markup import escape

from qtune.cache import cache_folder
from qtune.model import hub
from qtune.model.sources import MIRRORS

if TYPE_CHECKING:
    from types import ModuleType

_NEEDED = {"transformers": "5.17", "peft": "0.21", "accelerate": "1.12", "llvmlite": "0.45"}
_OPTIONAL = {"bitsandbytes": "needed to check the bitsandbytes export"}
_TORCH, _TRITON, _PYTHON = "2.11", "3.6", "3.11"
_MIN_FREE_GB = 5.0
_PIP_SECONDS = 20


class Line(NamedTuple):
    """One fact: its name, what was found, and whether qtune can work with it."""

    name: str
    value: str
    ok: bool


def report() -> list[Line]:
    """Every fact, in the order they are printed; takes a few seconds."""
    torch = _import_torch()
    has_gpu = torch is not None and torch.cuda.is_available()
    return [
        _at_least("python", platform.python_version(), _PYTHON),
        _torch(torch),
        *([] if torch is None else [_cpu(torch), *_gpus(torch)]),
        _triton(has_gpu),
        *(_package(name, minimum) for name, minimum in _NEEDED.items()),
        *([] if torch is None or _version("llvmlite") is None else [_cpu_kernels()]),
        *(_optional(name, use) for name, use in _OPTIONAL.items()),
        _memory(),
        _cache(),
        _hub(),
        _index(),
    ]


def _import_torch() -> "ModuleType | None":
    try:
        import torch
    except (ImportError, OSError):
        # OSError: a library that torch needs does not load.
        return None
    return torch


def _torch(torch: "ModuleType | None") -> Line:
    if torch is None:
        return Line("torch", f"missing or broken; install torch >= {_TORCH} (see README)", False)
    found = _at_least("torch", torch.__version__, _TORCH)
    build = f"CUDA {torch.version.cuda} build" if torch.version.cuda else "CPU build"
    return found._replace(value=f"{found.value}, {build}")


def _cpu(torch: "ModuleType") -> Line:
    # Private in torch, so absence only loses the word.
    checks = {"amx": "_is_amx_tile_supported", "avx512_bf16": "_is_avx512_bf16_supported"}
    known = {name: getattr(torch.cpu, check, None) for name, check in checks.items()}
    fast = [name for name, check in known.items() if check is not None and check()]
    bf16 = f"fast bf16 by {', '.join(fast)}" if fast else "bf16 without own instructions (slower)"
    level = torch.backends.cpu.get_cpu_capability()
    return Line("cpu", f"{torch.get_num_threads()} threads, {level}, {bf16}", True)


def _cpu_kernels() -> Line:
    from qtune_kernels.cpu import jit, team, tiles

    if not jit.available():
        return Line("cpu kernels", "none for this processor; plain PyTorch runs instead", True)
    kinds = "AVX-512 and AMX" if tiles.available() else "AVX-512; products by PyTorch"
    threads = "PyTorch's threads" if team.openmp() else "one thread, no OpenMP of PyTorch's found"
    return Line("cpu kernels", f"{kinds}, on {threads}", True)


def _gpus(torch: "ModuleType") -> list[Line]:
    if not torch.cuda.is_available():
        return [Line("gpu", "none that torch can use; the CPU path is used", True)]
    lines = []
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        value = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}"
        lines.append(Line(f"gpu {number}", value, (gpu.major, gpu.minor) >= (8, 0)))
    return lines


def _triton(has_gpu: bool) -> Line:
    if _version("triton") is None and not has_gpu:
        return Line("triton", "not installed; only a GPU needs it", True)
    return _package("triton", _TRITON)


def _package(name: str, minimum: str) -> Line:
    version = _version(name)
    if version is None:
        return Line(name, f"not installed; pip install '{name}>={minimum}'", False)
    return _at_least(name, version, minimum)


def _optional(name: str, use: str) -> Line:
    version = _version(name)
    return Line(name, version or f"not installed; {use}", version is not None)


def _at_least(name: str, version: str, minimum: str) -> Line:
    ok = _numbers(version) >= _numbers(minimum)
    return Line(name, version if ok else f"{version} is older than {minimum}; upgrade it", ok)


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3]]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory() -> Line:
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    # A container may have less than the machine.
    text = limit.read_text().strip() if limit.is_file() else "max"
    if text.isdigit():
        size = min(size, int(text))
    return Line("memory", f"{size / 2**30:.1f} GiB", True)


def _cache() -> Line:
    folder = cache_folder()
    existing = folder
    while not existing.is_dir():
        existing = existing.parent
    free = shutil.disk_usage(existing).free / 1e9
    if not os.access(existing, os.W_OK):
        return Line("cache", f"{folder} cannot be written; point QTUNE_CACHE elsewhere", False)
    return Line("cache", f"{folder}, {free:.1f} GB free", free >= _MIN_FREE_GB)


def _hub() -> Line:
    problem = hub.probe()
    if problem is None:
        return Line("hub", f"{hub.endpoint()} answers", True)
    mirrored = ", ".join(MIRRORS)
    return Line("hub", f"{problem}; local models work, and {mirrored} from the index", False)


def _index() -> Line:
    """Whether pip, as it is configured, finds a package that is a mirror of a model."""
    name = next(iter(MIRRORS.values())).name
    options = ["--disable-pip-version-check", "--no-input", "--retries=0", "--timeout=5"]
    command = [sys.executable, "-m", "pip", "index", "versions", name, *options]
    try:
        found = subprocess.run(
            command, capture_output=True, text=True, timeout=_PIP_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return Line("package index", f"pip gave no answer within {_PIP_SECONDS} s", False)
    if found.returncode:
        return Line("package index", f"pip finds no {name}; check pip config list", False)
    return Line("package index", f"answers ({found.stdout.splitlines()[0]})", True)


def show() -> None:
    """Print every fact, those that need attention marked."""
    from qtune.progress import console

    for line in report():
        mark = "[green]ok[/]" if line.ok else "[red]!![/]"
        console.print(f"{mark} {line.name:<14} {escape(line.value)}", soft_wrap=True)
