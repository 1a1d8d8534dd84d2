"""Which product a linear layer with an adapter runs on CUDA.

Few rows: the fused kernels, which start their sums with the adapter's part. Many: the weight is
dequantized once and multiplied by the vendor's GEMM, whose sum goes on over the adapter where rows
have room behind them (rows.py), and starts from the adapter's part elsewhere.
"""

from torch import Tensor

from qtune_kernels import lora_products as products
from qtune_kernels.linear_tiles import backward_tile, forward_tile
from qtune_kernels.lora_products import Weight


def forward(
    x: Tensor, weight: Weight, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """y [T, O] and u [T, R] of rows x [T, I]."""
    group, bits = weight.group_size, weight.bits
    tile = forward_tile(len(x), weight.shape, x.dtype, group, bits, x.device)
    if tile is not None:
        from qtune_kernels import linear_triton
        from qtune_kernels.lora_triton import Adapter

        u = x @ a.to(x.dtype).T
        adapter = Adapter(u, b, scaling)
        return linear_triton.linear(x, *weight[:-1], weight.shape[0], bias, tile, adapter), u
    if products.extends(x, len(a)):
        return products.forward_extended(x, weight, bias, a, b, scaling)
    return products.forward(x, weight.dense(x.dtype), bias, a, b, scaling)


def input_gradient(dy: Tensor, v: Tensor, weight: Weight, a: Tensor) -> Tensor:
    """dx [T, I] of rows dy [T, O] and v [T, R]."""
    group, bits = weight.group_size, weight.bits
    tile = backward_tile(len(dy), weight.shape, dy.dtype, group, bits, dy.device)
    if tile is not None:
        from qtune_kernels import linear_triton
        from qtune_kernels.lora_triton import Adapter

        return linear_triton.linear_dx(dy, *weight[:-1], weight.shape[1], tile, Adapter(v, a))
    if products.extends(dy, len(a)):
        return products.input_gradient_extended(dy, v, weight, a)
    return products.input_gradient(dy, v, weight.dense(dy.dtype), a)
