"""llama.cpp's cache of keys and values, one sequence per row, and the ids that it holds.

Where the next rows begin with ids that are there already, only what is new is computed. Keys and
values are kept in float16, which is llama.cpp's default.
"""

import ctypes
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from qtune.errors import UserError
from qtune.export.consumers.llama_file import LlamaFile
from qtune.export.consumers.llama_library import Batch, context_parameters, last_error

# tokens per call, which bounds the buffer of logits
MAX_TOKENS = 512

Ids = Sequence[int]
# token, position, row, whether its logits are wanted
Entry = tuple[int, int, int, bool]
_integer, _integers = ctypes.c_int32, ctypes.POINTER(ctypes.c_int32)


class LlamaContext:
    """A cache for `rows` sequences of `length` tokens; UserError where memory is too small."""

    def __init__(self, file: LlamaFile, rows: int, length: int) -> None:
        # it must not be freed before its context
        self._file, self._library = file, file.library
        self.rows, self.length = rows, length
        self._per_call = min(MAX_TOKENS, rows * length)
        numbers = (rows * length, self._per_call, self._per_call, rows)
        parameters = context_parameters(self._library, *numbers)
        self._handle = self._library.llama_init_from_model(file.model, parameters)
        if not self._handle:
            raise UserError(
                f"llama.cpp has no room for {rows} rows of {length} tokens: {last_error()}"
            )
        weakref.finalize(self, self._library.llama_free, self._handle)
        self._check()
        threads = torch.get_num_threads()
        self._library.llama_set_n_threads(self._handle, threads, threads)
        if file.adapter is not None:
            self._put_on(file.adapter)
        self._memory = self._library.llama_get_memory(self._handle)
        self._seen: list[Ids] = [[] for _ in range(rows)]

    def logits(self, rows: Sequence[Ids], wanted: Sequence[Ids]) -> Tensor:
        """Logits [N, V] float32 at the `wanted` places of each row, which are in ascending order.

        Raises UserError where llama.cpp fails.
        """
        entries: list[Entry] = []
        for number, (row, places) in enumerate(zip(rows, wanted, strict=True)):
            if places:
                entries += self._missing(number, row, places)
        step = self._per_call
        pieces = [self._decode(entries[i : i + step]) for i in range(0, len(entries), step)]
        return torch.cat([torch.empty(0, self._file.num_tokens), *pieces])

    def _missing(self, number: int, row: Ids, places: Ids) -> list[Entry]:
        """What is to be computed for the logits of a row at `places`: what is not in the cache."""
        start = min(_common(self._seen[number], row), places[0])
        if not self._library.llama_memory_seq_rm(self._memory, number, start, -1):
            # layers that keep no more than a window cannot go back
            start = 0
            self._library.llama_memory_seq_rm(self._memory, number, -1, -1)
        end, kept = places[-1] + 1, set(places)
        self._seen[number] = list(row[:end])
        return [(row[i], i, number, i in kept) for i in range(start, end)]

    def _decode(self, entries: list[Entry]) -> Tensor:
        tokens, positions, numbers, kept = zip(*entries, strict=True)
        num = len(entries)
        rows = (_integer * num)(*numbers)
        width, first = ctypes.sizeof(_integer), ctypes.addressof(rows)
        each = (ctypes.cast(first + i * width, _integers) for i in range(num))
        batch = Batch(
            num_tokens=num,
            token=(_integer * num)(*tokens),
            position=(_integer * num)(*positions),
            num_sequences=(_integer * num)(*[1] * num),
            sequences=(_integers * num)(*each),
            keep_logits=(ctypes.c_int8 * num)(*kept),
        )
        code = self._library.llama_decode(self._handle, batch)
        if code != 0:
            raise UserError(f"llama.cpp failed on {num} tokens (code {code}): {last_error()}")
        return self._logits(sum(kept))

    def _logits(self, num: int) -> Tensor:
        """The logits [num, V] of the last call, copied: the next one overwrites them."""
        if not num:
            return torch.empty(0, self._file.num_tokens)
        values = self._library.llama_get_logits(self._handle)
        array = ctypes.cast(values, ctypes.POINTER(ctypes.c_float * (num * self._file.num_tokens)))
        return torch.frombuffer(array.contents, dtype=torch.float32).view(num, -1).clone()

    def _put_on(self, adapter: int) -> None:
        adapters, scale = (ctypes.c_void_p * 1)(adapter), ctypes.c_float(1)
        code = self._library.llama_set_adapters_lora(self._handle, adapters, 1, ctypes.byref(scale))
        assert code == 0, "llama.cpp refuses an adapter that it has loaded"

    def _check(self) -> None:
        """What was set must be what llama.cpp took."""
        names = ("n_batch", "n_ubatch", "n_seq_max", "n_ctx_seq")
        found = [getattr(self._library, f"llama_{name}")(self._handle) for name in names]
        expected = [self._per_call, self._per_call, self.rows, self.length]
        assert found[:3] == expected[:3] and found[3] >= self.length, (found, expected)


def _common(seen: Ids, row: Ids) -> int:
    """How many ids in front are the same."""
    pairs = zip(seen, row, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(seen), len(row)))
