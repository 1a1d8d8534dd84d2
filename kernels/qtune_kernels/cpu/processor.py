"""What this machine's processor can do."""

from functools import cache

import llvmlite.binding as llvm


@cache
def features() -> frozenset[str]:
    """Its instruction sets by LLVM's names."""
    return frozenset(name for name, has in llvm.get_host_cpu_features().items() if has)


def rounds_to_bf16() -> bool:
    """Whether an instruction rounds float32 to bf16; LLVM would call a function that is not there.

    Skylake to Ice Lake have AVX-512 without it.
    """
    return "avx512bf16" in features()
