"""llama.cpp's C API, called through ctypes in the shared object of the `xllamacpp` wheel.

A C header is no part of the wheel, so what is known of it here is kept small and checked when it is
loaded. Parameter structures are taken as the bytes that llama.cpp fills with its defaults; only the
four numbers in front of the context's are ever changed, and `Context` reads them back. The one
structure that is filled here, `Batch`, is compared with one that llama.cpp made.
"""

import ctypes
from collections import deque
from functools import cache
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from qtune.errors import UserError

MISSING = (
    "xllamacpp, which brings llama.cpp to load and check the export, is missing: "
    "pip install xllamacpp"
)
TESTED = "2026.10.11549"
# more than any version's parameters take; what is behind them is not read
_PARAMETER_BYTES = 512
# n_ctx, n_batch, n_ubatch, n_seq_max
CONTEXT_DEFAULTS = (512, 2048, 512, 1)
_KEPT_MESSAGES = 40

_pointer, _int = ctypes.c_void_p, ctypes.c_int32
_ints = ctypes.POINTER(_int)
_Logger = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, _pointer)
# what llama.cpp reported last: the reason, where a file cannot be loaded
messages: deque[str] = deque(maxlen=_KEPT_MESSAGES)


class Parameters(ctypes.Structure):
    """Parameters of a model or a context, as llama.cpp's defaults with unknown places."""

    _fields_ = (("data", ctypes.c_uint8 * _PARAMETER_BYTES),)


class Batch(ctypes.Structure):
    """Tokens to compute: for each its id, position, sequences, and whether its logits are kept."""

    _fields_ = (
        ("num_tokens", _int),
        ("token", _ints),
        ("embedding", ctypes.POINTER(ctypes.c_float)),
        ("position", _ints),
        ("num_sequences", _ints),
        ("sequences", ctypes.POINTER(_ints)),
        ("keep_logits", ctypes.POINTER(ctypes.c_int8)),
    )


# name: result, arguments
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (_Logger, _pointer)),
    "llama_model_default_params": (Parameters, ()),
    "llama_model_load_from_file": (_pointer, (ctypes.c_char_p, Parameters)),
    "llama_model_free": (None, (_pointer,)),
    "llama_model_get_vocab": (_pointer, (_pointer,)),
    "llama_vocab_n_tokens": (_int, (_pointer,)),
    "llama_tokenize": (
        _int,
        (_pointer, ctypes.c_char_p, _int, _ints, _int, ctypes.c_bool, ctypes.c_bool),
    ),
    "llama_vocab_is_eog": (ctypes.c_bool, (_pointer, _int)),
    "llama_context_default_params": (Parameters, ()),
    "llama_init_from_model": (_pointer, (_pointer, Parameters)),
    "llama_free": (None, (_pointer,)),
    "llama_n_ctx_seq": (ctypes.c_uint32, (_pointer,)),
    "llama_n_batch": (ctypes.c_uint32, (_pointer,)),
    "llama_n_ubatch": (ctypes.c_uint32, (_pointer,)),
    "llama_n_seq_max": (ctypes.c_uint32, (_pointer,)),
    "llama_set_n_threads": (None, (_pointer, _int, _int)),
    "llama_adapter_lora_init": (_pointer, (_pointer, ctypes.c_char_p)),
    "llama_set_adapters_lora": (
        _int,
        (_pointer, ctypes.POINTER(_pointer), ctypes.c_size_t, ctypes.POINTER(ctypes.c_float)),
    ),
    "llama_get_memory": (_pointer, (_pointer,)),
    "llama_memory_seq_rm": (ctypes.c_bool, (_pointer, _int, _int, _int)),
    "llama_batch_get_one": (Batch, (_ints, _int)),
    "llama_decode": (_int, (_pointer, Batch)),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), (_pointer,)),
}


@cache
def library() -> Any:
    """The shared object with the functions named here, checked and told to be quiet.

    Raises UserError where xllamacpp is missing, or is a version whose C API is another one.
    """
    if find_spec("xllamacpp") is None:
        raise UserError(MISSING)
    path = import_module("xllamacpp.xllamacpp").__file__
    assert path is not None
    found = ctypes.CDLL(path)
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(found, name, None)
        if function is None:
            raise UserError(_changed(f"it has no {name}"))
        function.restype, function.argtypes = result, arguments
    _check_structures(found)
    found.llama_log_set(_logger, None)
    found.llama_backend_init()
    return found


def context_parameters(found: Any, *numbers: int) -> Parameters:
    """The defaults of a context with n_ctx, n_batch, n_ubatch and n_seq_max replaced."""
    parameters: Parameters = found.llama_context_default_params()
    ctypes.memmove(parameters.data, (ctypes.c_uint32 * len(numbers))(*numbers), 4 * len(numbers))
    return parameters


def last_error() -> str:
    """What llama.cpp said last, the lines that name an error or else the last one."""
    errors = [line for line in messages if "error" in line or "failed" in line]
    return "; ".join(dict.fromkeys(errors or list(messages)[-1:])) or "llama.cpp gave no reason"


def _keep_message(level: int, text: bytes, _: Any) -> None:
    line = text.decode(errors="replace").strip()
    if line:
        messages.append(line)


# llama.cpp calls it as long as the process lives
_logger = _Logger(_keep_message)


def _check_structures(found: Any) -> None:
    """Raises UserError unless llama.cpp puts known values where they are expected."""
    defaults = found.llama_context_default_params().data
    if tuple((ctypes.c_uint32 * 4).from_buffer_copy(defaults)) != CONTEXT_DEFAULTS:
        raise UserError(_changed("llama_context_params begins with other fields"))
    tokens = (_int * 3)(5, 6, 7)
    batch = found.llama_batch_get_one(tokens, len(tokens))
    empty = (batch.embedding, batch.position, batch.num_sequences, batch.sequences)
    if batch.num_tokens != len(tokens) or batch.token[2] != tokens[2] or any(map(bool, empty)):
        raise UserError(_changed("llama_batch has other fields"))


def _changed(what: str) -> str:
    return (
        f"the C API of llama.cpp in xllamacpp {version('xllamacpp')} is not the one that qtune "
        f"knows: {what}; pip install xllamacpp=={TESTED}"
    )
