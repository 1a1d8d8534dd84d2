"""What results depend on: device, driver, versions, commit, date."""

import subprocess
from pathlib import Path
from typing import Any

import torch

from qtune.environment import environment

ROOT = Path(__file__).parents[2]


def facts(device: torch.device, commit: str | None) -> dict[str, Any]:
    """Everything a reader needs to judge or repeat the figures, ready for JSON."""
    found = environment(device) | {"commit": commit or git_commit()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "driver": _driver(),
        }
    return found


def git_commit() -> str:
    """The commit of the working tree, `+` behind it where files differ; "unknown" outside git."""
    done = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if not done:
        return "unknown"
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return done + ("+" if changed else "")


def _driver() -> str:
    words = ["--query-gpu=driver_version", "--format=csv,noheader"]
    return _output("nvidia-smi", *words).partition("\n")[0]


def _output(*command: str) -> str:
    """What a command prints; nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
