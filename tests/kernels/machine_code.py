"""Compiles kernels for a GPU that is not there and counts what the assembler made of them.

That is done in processes without TRITON_INTERPRET, which are kept, since importing Triton takes as
long as compiling a kernel. The tools are those in Triton's wheel.
"""

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

Name = TypeVar("Name")

OPCODE = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)")
LABEL = re.compile(r"(\.L_x_\d+):")
BRANCH = re.compile(r"BRA(?:\.U)?\s.*`\((\.L_x_\d+)\)")


@dataclass(frozen=True)
class Request:
    """A kernel, its target and compile-time arguments; None among these leaves out a pointer."""

    module: str
    kernel: str
    arch: int
    constants: dict[str, Any]
    pointers: dict[str, str]
    warps: int
    stages: int
    fusion: bool


@dataclass(frozen=True)
class MachineCode:
    """What the assembler reports, and opcodes in the whole kernel and in its longest loop."""

    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    opcodes: dict[str, int]
    loop_opcodes: dict[str, int]

    @property
    def spills(self) -> bool:
        """Whether registers did not suffice, so that memory of a thread is used."""
        return bool(self.stack_bytes or self.local_bytes or {"LDL", "STL"} & set(self.opcodes))


class Compiler:
    """Processes that compile kernels, one for each processor."""

    def __init__(self, cache: Path) -> None:
        # imports count more than the second processor where there are many
        self._pool = ProcessPoolExecutor(
            min(4, os.cpu_count() or 1), get_context("spawn"), _prepare, (str(cache),)
        )

    def __call__(self, requests: Mapping[Name, Request]) -> dict[Name, MachineCode]:
        """The machine code of each request by its name; raises what its compilation raises."""
        return dict(zip(requests, self._pool.map(_machine_code, requests.values()), strict=True))

    def close(self) -> None:
        """End the processes."""
        self._pool.shutdown()


def longest_loop(lines: list[str]) -> list[str]:
    """The lines between a label and the farthest branch back to it; none where there is no loop."""
    labels: dict[str, int] = {}
    longest: list[str] = []
    for number, line in enumerate(lines):
        if label := LABEL.match(line.strip()):
            labels[label[1]] = number
        branch = BRANCH.search(line)
        if branch and branch[1] in labels and number - labels[branch[1]] > len(longest):
            longest = lines[labels[branch[1]] : number + 1]
    return longest


def count_opcodes(lines: list[str]) -> dict[str, int]:
    """How often each opcode occurs, without its modifiers."""
    return dict(Counter(match[1] for line in lines if (match := OPCODE.match(line))))


def _prepare(cache: str) -> None:
    """What a process does before it imports Triton."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = cache


def _machine_code(request: Request) -> MachineCode:
    return _read(*_compile(request))


def _compile(request: Request) -> tuple[bytes, int]:
    """The machine code, and the bytes of shared memory that a launch asks for."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(request.module), request.kernel)
    signature, constants, attributes = {}, {}, {}
    # what has a default and no type was left out
    given = {each.name: each.default for each in kernel.params if each.has_default}
    given = {name: default for name, default in given.items() if name not in request.pointers}
    given |= request.constants
    for index, name in enumerate(kernel.arg_names):
        if name in given:
            signature[name] = "constexpr"
            constants[(index,)] = given[name]
        else:
            signature[name] = request.pointers.get(name, "i32")
            # what a launch finds out by itself: addresses and sizes are multiples of 16
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options = {
        "num_warps": request.warps,
        "num_stages": request.stages,
        "enable_fp_fusion": request.fusion,
    }
    compiled = triton.compile(source, target=GPUTarget("cuda", request.arch, 32), options=options)
    return compiled.asm["cubin"], compiled.metadata.shared


def _read(cubin: bytes, shared: int) -> MachineCode:
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", file.name)
        listing = _output(tools / "nvdisasm", "-c", file.name).splitlines()
    stack, local = re.search(r"STACK:(\d+).*LOCAL:(\d+)", usage).groups()
    loop = longest_loop(listing)
    opcodes = count_opcodes(listing), count_opcodes(loop)
    return MachineCode(int(stack), int(local), shared, *opcodes)


def _output(*command: Path | str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
