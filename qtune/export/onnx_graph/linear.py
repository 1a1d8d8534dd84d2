"""A linear layer as nodes: a product with codes, and LoRA as two small products beside it.

So the graph is exactly the trained model: codes and scales are those it was trained on, and the
adapter (arXiv 2106.09685) stays what it is. NF4 and FP4 are bitsandbytes' layout (MatMulBnb4),
integers of 2, 4 and 8 bits are MatMulNBits, whose zero points may be floats with 2 and 4 bits: so
trained ones, and those that QA-LoRA was merged into, are held too. Products are taken in float32:
ONNX Runtime can round inputs to 8 bits, which loses far more than it should (`accuracy_level` 4).
"""

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from qtune.errors import UserError
from qtune.export.onnx_graph.graph import MICROSOFT, Graph
from qtune.quant.linear import QuantLinear
from qtune_kernels.packing import to_bitsandbytes, unpack
from qtune_kernels.scales import dequantize_scales, unpack_zeros

# their numbers in ONNX Runtime
TABLES = {"fp4": 0, "nf4": 1}
INTEGERS = ("int4", "int4_sym", "int8", "int2", "int2_sym")
FORMATS = (*TABLES, *INTEGERS)
# whose zero points may be any numbers
MOVABLE = ("int4", "int4_sym", "int2", "int2_sym")
FLOAT32_PRODUCTS = 1
SMALLEST_GROUP = 16


def linear(graph: Graph, x: str, name: str, layer: nn.Module) -> str:
    """The name of y [.., O] of x [.., I], for the layer of that name with its active adapter.

    Raises UserError for a layer, or an adapter, that has no nodes.
    """
    base = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
    y = _product(graph, x, name, base)
    if isinstance(layer, LoraLayer):
        y = _with_adapters(graph, x, y, name, layer)
    bias = getattr(base, "bias", None)
    if bias is None:
        return y
    return graph.op("Add", [y, graph.weight(f"{name}.bias", bias.float())], f"{name}/biased")


def dense(graph: Graph, x: str, name: str, weight: Tensor) -> str:
    """The name of x W^T for a dense weight [O, I], which stays in its dtype on the disk."""
    stored = graph.weight(f"{name}.weight", weight)
    if weight.dtype != torch.float32:
        stored = graph.op("Cast", [stored], f"{name}/float32", to=1)
    turned = graph.op("Transpose", [stored], f"{name}/transposed", perm=[1, 0])
    return graph.op("MatMul", [x, turned], f"{name}/product")


def _product(graph: Graph, x: str, name: str, layer: nn.Module) -> str:
    if not isinstance(layer, QuantLinear):
        return dense(graph, x, name, layer.get_parameter("weight"))
    _check(name, layer)
    tables = layer.storage.format in TABLES
    return (_table_product if tables else _integer_product)(graph, x, name, layer)


def _table_product(graph: Graph, x: str, name: str, layer: QuantLinear) -> str:
    packed, scales = layer.quant_weight
    kind, zero = layer.storage.format, layer.format.levels.index(0)
    codes = to_bitsandbytes(packed, layer.in_features * layer.out_features, zero)
    weights = [
        graph.weight(f"{name}.codes", codes.reshape(-1)),
        graph.weight(f"{name}.scales", dequantize_scales(scales)),
    ]
    return graph.op(
        "MatMulBnb4",
        [x, *weights],
        f"{name}/product",
        domain=MICROSOFT,
        K=layer.in_features,
        N=layer.out_features,
        block_size=layer.group_size,
        quant_type=TABLES[kind],
    )


def _integer_product(graph: Graph, x: str, name: str, layer: QuantLinear) -> str:
    (outputs, inputs), size, bits = layer.shape, layer.group_size, layer.format.bits
    packed, scales = layer.quant_weight
    codes = packed_rows(unpack(packed.cpu(), bits, outputs * inputs).view(outputs, inputs), bits)
    # [O, I/G, ..]
    groups = outputs, inputs // size, -1
    weights = [
        graph.weight(f"{name}.codes", codes.view(groups)),
        graph.weight(f"{name}.scales", dequantize_scales(scales).view(groups[:2])),
        graph.weight(f"{name}.zeros", _stored_zeros(layer).view(groups[0], -1)),
    ]
    return graph.op(
        "MatMulNBits",
        [x, *weights],
        f"{name}/product",
        domain=MICROSOFT,
        K=inputs,
        N=outputs,
        block_size=size,
        bits=bits,
        accuracy_level=FLOAT32_PRODUCTS,
    )


def _stored_zeros(layer: QuantLinear) -> Tensor:
    """Zero points of rows, packed as codes are, or float32 where they are no codes.

    Faster kernels know the former only.
    """
    zeros = _zeros(layer).view(layer.out_features, -1)
    whole = zeros.to(torch.uint8)
    return packed_rows(whole, layer.format.bits) if torch.equal(whole.float(), zeros) else zeros


def _zeros(layer: QuantLinear) -> Tensor:
    """Zero points, float32 [S], of all groups, in codes."""
    scales, bits = layer.quant_weight.scales, layer.format.bits
    number = layer.in_features * layer.out_features // layer.group_size
    first = layer.format.levels[0] if layer.format.levels else -(1 << (bits - 1))
    if scales.zeros is None:
        return torch.full((number,), float(-first))
    return unpack_zeros(scales.zeros.cpu(), bits, number).float() - first


def _check(name: str, layer: QuantLinear) -> None:
    """Raises UserError for a layer that there is no product for."""
    storage, size = layer.storage, layer.group_size
    problems = [
        (
            storage.format not in FORMATS,
            f"it is {storage.format}, and the graph holds {', '.join(FORMATS)}; export the merged "
            "form, or qtune",
        ),
        (storage.rotated, "its inputs are rotated; set quant.rotate: false, or export qtune"),
        (storage.channels, "its inputs have channel factors; set quant.method: gptq"),
        (
            storage.format not in MOVABLE and storage.zeros in ("half", "float"),
            f"zero points of {storage.format} that were trained have no product in ONNX Runtime; "
            "export qtune or bf16",
        ),
        (
            size < SMALLEST_GROUP or size & (size - 1) != 0,
            f"groups of {size} weights, and ONNX Runtime has powers of two; set "
            "quant.group_size: 64",
        ),
        (
            storage.format in INTEGERS and layer.in_features % size != 0,
            f"groups of {size} do not divide its {layer.in_features} inputs; set quant.group_size "
            "to a number that does",
        ),
    ]
    for is_there, problem in problems:
        if is_there:
            raise UserError(f"{name}: {problem}")


def packed_rows(codes: Tensor, bits: int) -> Tensor:
    """uint8 [O, bytes] of codes [O, N], low bits first; each row ends with a byte."""
    each = 8 // bits
    missing = -codes.shape[1] % each
    places = nn.functional.pad(codes, (0, missing)).view(len(codes), -1, each)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return (places << shifts).sum(-1, dtype=torch.uint8)


def _with_adapters(graph: Graph, x: str, y: str, name: str, layer: LoraLayer) -> str:
    """The name of y + s B A x, for each active adapter."""
    for adapter in layer.active_adapters:
        if adapter not in layer.lora_A:
            continue
        if adapter in layer.lora_variant or layer.lora_bias[adapter]:
            raise UserError(
                f"{name}: an adapter of this kind has no nodes in ONNX; export the merged form"
            )
        parts = (layer.lora_A, layer.lora_B)
        a, b = (part[adapter].get_parameter("weight").float() for part in parts)
        weights = a.T, b.T * float(layer.scaling[adapter])
        for part, weight in zip("AB", weights, strict=True):
            stored = graph.weight(f"{name}.lora_{part}", weight)
            made = x if part == "A" else f"{name}/lora_A"
            graph.op("MatMul", [made, stored], f"{name}/lora_{part}")
        y = graph.op("Add", [y, f"{name}/lora_B"], f"{name}/adapted")
    return y
