"""Compiles kernels for a GPU that is not there and counts what the assembler made of them.

Run as a program, without TRITON_INTERPRET: reads requests as JSON on standard input, one list of
`Request` fields each, and prints one `MachineCode` each as JSON. The tools are those in Triton's
wheel.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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


def compile_all(requests: list[Request], cache: Path) -> list[MachineCode]:
    """The machine code of each request, compiled in one process of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps([asdict(request) for request in requests]),
        env=environment | {"TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return [MachineCode(**fields) for fields in json.loads(done.stdout)]


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


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2] / "kernels"))
    requests = [Request(**fields) for fields in json.load(sys.stdin)]
    print(json.dumps([asdict(_read(*_compile(request))) for request in requests]))
