"""An int8 base as Q8_0, bit for bit: the same integers, and scales in float16 per block of 32.

Groups of more weights repeat their scale in each of their blocks. What is not quantized goes into
the type that holds it exactly, for the pair is to be the model that was trained.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from qtune.errors import UserError
from qtune.export.folder.int_weight import int_weight
from qtune.export.folder.quantized import quantized_tensors
from qtune.export.folder.trained import Trained
from qtune.export.gguf_file.write import Encoded
from qtune.model.checkpoint import Names
from qtune.quant.kquants.encoder import encode
from qtune.quant.linear import QuantLinear

# weights that share a scale in Q8_0
BLOCK = 32


def pair_tensors(trained: Trained) -> Iterator[tuple[str, Tensor | Encoded]]:
    """Name in the model and tensor of all weights of the base of a pair.

    Raises UserError for a layer that Q8_0 cannot hold as it is.
    """
    names = Names.of(trained.base)
    for stored, tensor in quantized_tensors(trained, _blocks):
        name = names.in_model(stored)
        if tensor.dtype == torch.uint8:
            yield name, Encoded(tensor, "Q8_0")
        else:
            yield name, exact(tensor) if tensor.ndim == 2 else tensor


def exact(matrix: Tensor) -> Encoded:
    """The matrix in float16 where that changes nothing, or else in its own type."""
    kind = "F16" if torch.equal(matrix.half().to(matrix.dtype), matrix) else "BF16"
    if kind == "BF16" and matrix.dtype != torch.bfloat16:
        kind = "F32"
    return Encoded(encode(matrix, kind), kind)


def _blocks(prefix: str, layer: QuantLinear) -> Iterator[tuple[str, Tensor]]:
    """The weight of one layer as Q8_0, uint8 [O, I/32 * 34]; its bias as it is."""
    name = prefix.removesuffix(".")
    weight = int_weight(name, layer, ("int8",))
    if weight.group_size % BLOCK:
        raise UserError(
            f"{name}: Q8_0 has a scale for every {BLOCK} weights, which groups of "
            f"{weight.group_size} are not made of; set quant.group_size: 64"
        )
    outputs, inputs = weight.codes.shape
    scales = weight.scales.half().repeat_interleave(weight.group_size // BLOCK, 1)
    numbers = (weight.codes.int() - 128).to(torch.int8)
    parts = (scales.view(-1, 1), numbers.view(-1, BLOCK))
    blocks = torch.cat([part.contiguous().view(torch.uint8) for part in parts], 1)
    yield f"{prefix}weight", blocks.view(outputs, inputs // BLOCK * blocks.shape[1])
