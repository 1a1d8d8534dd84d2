"""Kernels: a Python function that writes one, compiled at its first call, and how it is called.

    @kernel
    def _double(code: Code, x: Pointer, count: Integer, *, dtype: str) -> None:
        with code.share(count // LANES) as block: ...

    _double(tensor.data_ptr(), tensor.numel(), dtype="bf16")

Parameters by position are given at run time; those after the star are fixed when it is compiled,
once for every combination. Every thread runs the whole function; `code.share` divides a loop.
"""

import ctypes
import inspect
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NewType

import llvmlite.binding as llvm
from llvmlite import ir

from qtune_kernels.cpu import team
from qtune_kernels.cpu.processor import features
from qtune_kernels.cpu.simd import F32, F64, I32, I64, POINTER, Code, Operand, Value

# what run-time parameters of kernels are annotated with: an address, an int64, a float32
Pointer = NewType("Pointer", Value)
Integer = NewType("Integer", Value)
Number = NewType("Number", Value)


class KernelCode(Code):
    """The body of a kernel: `Code` that knows its thread among those that run it."""

    def __init__(self, function: ir.Function, num_arguments: int) -> None:
        super().__init__(function)
        self._block = Value(self, function.args[0])
        self.workers = self._argument(num_arguments)
        self.worker = self._worker()

    def share(self, count: Operand) -> Any:
        """A loop over this thread's part of 0, 1, ... below `count`: neighbours, in order."""
        return self._share(self.value(count, I64))

    @contextmanager
    def _share(self, count: Value) -> Iterator[Value]:
        start, stop = self.part(count)
        with self.loop(stop, start) as index:
            yield index

    def part(self, count: Value) -> tuple[Value, Value]:
        """Where this thread's part of 0, 1, ... below `count` begins and ends."""
        return self.worker * count // self.workers, (self.worker + 1) * count // self.workers

    def arguments(self, kinds: list[Any]) -> list[Value]:
        """The run-time arguments, as their annotations say."""
        return [self._typed(self._argument(number), kind) for number, kind in enumerate(kinds)]

    def _typed(self, word: Value, kind: Any) -> Value:
        if kind is Pointer:
            return Value(self, self.builder.inttoptr(word.ir, POINTER))
        return word.bits(F64).to(F32) if kind is Number else word

    def _argument(self, number: int) -> Value:
        return self.load(self._block + 8 * number, I64)

    def _worker(self) -> Value:
        if team.openmp() is None:
            return self.integer(0)
        return self.call("omp_get_thread_num", I32).to(I64)


class Kernel:
    """A kernel as a Python callable: integers (addresses included) and floats by position."""

    def __init__(self, write: Callable[..., None]) -> None:
        self._write = write
        self.__doc__, self.__name__ = write.__doc__, write.__name__
        _, *parameters = inspect.signature(write).parameters.values()
        self._kinds = [p.annotation for p in parameters if p.kind is not p.KEYWORD_ONLY]
        # what a call passes on: its arguments as 64-bit words, and the number of threads
        letters = ["d" if kind is Number else "q" for kind in self._kinds]
        self._words = struct.Struct("".join(letters) + "q")
        self._compiled: dict[tuple[Any, ...], int] = {}

    def __call__(self, *arguments: float, **fixed: Any) -> None:
        """Run on all of PyTorch's threads and return when they are done."""
        workers = team.num_workers()
        team.run(self.address(**fixed), self._words.pack(*arguments, workers), workers)

    def address(self, **fixed: Any) -> int:
        """Where its machine code lies for these fixed parameters, compiled if it was not yet."""
        key = tuple(fixed.items())
        found = self._compiled.get(key)
        if found is None:
            found = self._compiled[key] = _compile(self.__name__, self.text(**fixed))
        return found

    def text(self, **fixed: Any) -> str:
        """Its LLVM instructions."""
        module = ir.Module(self.__name__)
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), [POINTER]), self.__name__)
        code = KernelCode(function, len(self._kinds))
        self._write(code, *code.arguments(self._kinds), **fixed)
        code.builder.ret_void()
        return str(module)


kernel = Kernel


def available() -> bool:
    """Whether kernels run here: a 64-bit machine whose vectors hold 16 float32."""
    return "avx512f" in features()


def assembly(text: str, processor: str | None = None) -> str:
    """The machine instructions that LLVM makes for this processor, or for another of that name."""
    machine = _machine() if processor is None else _target().create_target_machine(cpu=processor)
    made: str = machine.emit_assembly(_optimized(text, machine))
    return made


def _compile(name: str, text: str) -> int:
    """The address of a function in machine code for this processor."""
    machine = _machine()
    engine = llvm.create_mcjit_compiler(_optimized(text, machine), machine)
    engine.finalize_object()
    _engines.append(engine)
    address: int = engine.get_function_address(name)
    return address


def _optimized(text: str, machine: llvm.TargetMachine) -> llvm.ModuleRef:
    module = llvm.parse_assembly(text)
    module.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return module


# machine code lives as long as its engine
_engines: list[llvm.ExecutionEngine] = []


def _machine() -> llvm.TargetMachine:
    """This processor, with its widest vectors."""
    library = team.openmp()
    if library is not None:
        entry = ctypes.cast(library.omp_get_thread_num, ctypes.c_void_p).value
        llvm.add_symbol("omp_get_thread_num", entry)
    flags = ",".join(f"+{name}" for name in sorted(features())) + ",-prefer-256-bit"
    return _target().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=flags, opt=3, jit=True
    )


def _target() -> llvm.Target:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple()
