"""Merged weights in 8 bits with one scale for each output channel, computed here.

What serves them rounds inputs too, token by token, so finer scales would be lost on it and nothing
is calibrated. Each tensor of the merge is quantized as it comes, once.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from qtune.export.folder.dense import dense_bytes, dense_tensors
from qtune.export.folder.quantized import quantized_weights
from qtune.export.folder.trained import Trained
from qtune.model.checkpoint import Names, bare_name

LARGEST_INT8 = 127
LARGEST_FP8 = torch.finfo(torch.float8_e4m3fn).max

# the tensors of a layer, by full name, given its name with the dot and its weight [O, I]
EncodeDense = Callable[[str, Tensor], Iterator[tuple[str, Tensor]]]


def encoded_merge(trained: Trained, encode: EncodeDense) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of all that is written: of layers to quantize what `encode` makes of them."""
    names, chosen = Names.of(trained.base), quantized_weights(trained)
    for stored, tensor in dense_tensors(trained):
        if names.in_model(stored) in chosen:
            yield from encode(stored.removesuffix("weight"), tensor)
        else:
            yield stored, tensor


def encoded_bytes(trained: Trained) -> int:
    """The bytes of the merge with one for each weight of the layers to quantize."""
    chosen = quantized_weights(trained)
    linears = [
        layer
        for name, layer in trained.base.named_modules()
        if isinstance(layer, nn.Linear) and bare_name(f"{name}.weight") in chosen
    ]
    saved = sum(layer.in_features * layer.out_features for layer in linears)
    return dense_bytes(trained) - saved


def int8_channels(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, int8 [O, I], and scales [O, 1] in the dtype of a weight [O, I]."""
    scales, ratios = _scaled(weight, LARGEST_INT8)
    return ratios.round_().clamp_(-LARGEST_INT8, LARGEST_INT8).to(torch.int8), scales


def fp8_channels(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, float8_e4m3fn [O, I], and scales [O, 1] in the dtype of a weight [O, I]."""
    scales, ratios = _scaled(weight, LARGEST_FP8)
    # beyond the largest number a cast gives NaN
    return ratios.clamp_(-LARGEST_FP8, LARGEST_FP8).to(torch.float8_e4m3fn), scales


def _scaled(weight: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """Scales that bring each row's largest magnitude to `largest`, and the row over its scale.

    Scales are rounded first: programs that keep them in 16 bits then decode the same weights.
    """
    weight, dtype = weight.float(), weight.dtype
    scales = (weight.abs().amax(1, keepdim=True) / largest).to(dtype)
    return scales.clamp_(min=torch.finfo(dtype).smallest_normal), weight / scales.float()
