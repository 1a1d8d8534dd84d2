import platform
import subprocess
import sys

import psutil
import pytest
import torch

from qtune import machine
from qtune.machine import Peak, available_bytes

CPU = torch.device("cpu")


def test_peak_sees_what_is_gone_again():
    peak = Peak(CPU)
    size = 64 << 20
    torch.ones(size, dtype=torch.uint8)
    assert peak.bytes() > 0.9 * size


def test_peak_without_help_from_the_system(tmp_path):
    """In a process of its own: the peak of this one may be long past."""
    code = f"""
from pathlib import Path
import torch
from qtune import machine
machine.CLEAR_REFS = machine.STATUS = Path({str(tmp_path / "none")!r})
peak = machine.Peak(torch.device("cpu"))
held = torch.ones(64 << 20, dtype=torch.uint8)
assert peak.bytes() > 0.9 * held.nbytes, peak.bytes()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_container_has_what_its_limit_leaves(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    found = available_bytes(CPU)
    assert found == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    (tmp_path / "memory.max").write_text("10000\n")
    (tmp_path / "memory.current").write_text("7000\n")
    (tmp_path / "memory.stat").write_text("anon 5000\ninactive_file 2000\n")
    assert available_bytes(CPU) == 5000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert available_bytes(CPU) == 2500
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(CPU) > 5000


# in a process of its own: free gaps that other tests have left would be used first
STEPS = """
import resource, psutil, torch
from qtune.machine import keeping_freed_memory

def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(1 << 22, dtype=torch.uint8) for _ in range(20)]
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with keeping_freed_memory():
    # gaps between what was there before are filled first
    again = [faults_of_a_step() for _ in range(5)][-1]
    held = psutil.Process().memory_info().rss
print(again, held - psutil.Process().memory_info().rss)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_freed_memory_is_used_again_and_given_back_at_the_end():
    done = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    faults, given_back = (int(word) for word in done.stdout.split())
    # 80 MiB are 20480 pages of 4 KiB
    assert faults < 2000
    assert given_back > 60 << 20
