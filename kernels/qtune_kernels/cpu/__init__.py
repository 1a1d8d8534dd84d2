"""CPU kernels, compiled in the process by LLVM when they are first called.

`simd.py` is the language they are written in, `jit.py` compiles and runs them, `team.py` shares the
work over PyTorch's own threads. No compiler is needed on the machine: llvmlite brings LLVM along.
"""
