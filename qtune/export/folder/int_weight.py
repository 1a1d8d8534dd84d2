"""The integers of a quantized layer as every integer container takes them.

Formats differ in how their codes are offset: all become unsigned codes with a zero point for each
group. What such a container cannot say of a layer is refused here by its name, so that no exporter
writes something else than what was trained.
"""

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from qtune.errors import UserError
from qtune.export.folder.int_packing import codes_per_word
from qtune.quant.linear import QuantLinear
from qtune.quant.storage import Storage
from qtune_kernels.packing import unpack
from qtune_kernels.scales import dequantize_scales, unpack_zeros

# the zero point of formats that have none of their own: the code that stands for 0
MIDDLE = {"int4_sym": 8, "int8": 128}


class IntWeight(NamedTuple):
    """A matrix [O, I] with weight = (code - zero) * scale, by groups of neighbours in a row.

    `codes` are uint8 [O, I], `scales` float32 [O, I/G], each a float16 number, `zeros` uint8
    [O, I/G].
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    group_size: int


def int_weight(name: str, layer: QuantLinear, formats: Collection[str]) -> IntWeight:
    """The integers of the layer called `name`, on the CPU, for a container of these formats.

    Raises UserError for a layer of another one, and for sizes, scales or zero points that no
    container holds as they are.
    """
    _check_storage(name, layer.storage, formats)
    _check_sizes(name, layer)
    outputs, inputs = layer.shape
    group_size, bits = layer.group_size, layer.format.bits
    packed, stored = layer.quant_weight
    codes = unpack(packed.cpu(), bits, outputs * inputs).view(outputs, inputs)
    scales = dequantize_scales(stored).cpu().view(outputs, inputs // group_size)
    if not torch.equal(scales.half().float(), scales):
        raise UserError(
            f"{name}: its scales are no float16 numbers, which integer containers keep; export "
            "qtune or bf16"
        )
    zeros = _zeros(layer, scales.numel()).view(scales.shape)
    return IntWeight(codes, scales, zeros, bits, group_size)


def _zeros(layer: QuantLinear, number: int) -> Tensor:
    stored = layer.quant_weight.scales.zeros
    if stored is None:
        return torch.full((number,), MIDDLE[layer.storage.format], dtype=torch.uint8)
    return unpack_zeros(stored.cpu(), layer.format.bits, number).to(torch.uint8)


def _check_storage(name: str, storage: Storage, formats: Collection[str]) -> None:
    problems = [
        (
            storage.format not in formats,
            f"it is {storage.format} and the export holds {' or '.join(formats)}; export qtune",
        ),
        (storage.rotated, "its inputs are rotated; set quant.rotate: false, or export qtune"),
        (storage.channels, "its inputs have channel factors; set quant.method: gptq"),
        (
            storage.zeros in ("half", "float"),
            "its zero points were trained and are no whole numbers; export qtune or bf16",
        ),
    ]
    for is_there, problem in problems:
        if is_there:
            raise UserError(f"{name}: {problem}")


def _check_sizes(name: str, layer: QuantLinear) -> None:
    outputs, inputs = layer.shape
    if inputs % layer.group_size:
        raise UserError(
            f"{name}: groups of {layer.group_size} do not divide its {inputs} inputs; set "
            "quant.group_size to a number that does, or to row"
        )
    places = codes_per_word(layer.format.bits)
    if outputs % places or inputs % places:
        raise UserError(
            f"{name}: words hold {places} codes, which do not divide {outputs} outputs and "
            f"{inputs} inputs; name it in quant.skip, or export qtune"
        )
