"""ggml's own block encoders, called in the library of the `xllamacpp` wheel: the truth for ours."""

import ctypes
from functools import cache

import gguf
import torch
from torch import Tensor


def ggml_encode(weight: Tensor, kind: str, importance: Tensor | None = None) -> Tensor:
    """The bytes, uint8 [O, B], that ggml makes of a float32 weight [O, I]."""
    code = gguf.GGMLQuantizationType[kind]
    weights, type_size = gguf.GGML_QUANT_SIZES[code]
    rows, columns = weight.shape
    encoded = torch.zeros(rows, columns // weights * type_size, dtype=torch.uint8)
    weight = weight.float().contiguous()
    worth = None if importance is None else importance.float().contiguous()
    written = _library().ggml_quantize_chunk(
        int(code),
        weight.data_ptr(),
        encoded.data_ptr(),
        0,
        rows,
        columns,
        None if worth is None else worth.data_ptr(),
    )
    assert written == encoded.numel()
    return encoded


def decode(encoded: Tensor, kind: str) -> Tensor:
    """The weights, float32 [O, I], that package `gguf` reads in bytes [O, B]."""
    code = gguf.GGMLQuantizationType[kind]
    return torch.from_numpy(gguf.quants.dequantize(encoded.numpy(), code))


@cache
def _library() -> ctypes.CDLL:
    import xllamacpp.xllamacpp as built

    library = ctypes.CDLL(built.__file__)
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        *(ctypes.c_int, pointer, pointer),
        *(number, number, number, pointer),
    ]
    return library
