"""The calls that unsloth makes for a LoRA layer, one for one, where unsloth itself cannot run.

Read in its sources (unsloth/kernels/fast_lora.py and utils.py, Apache-2.0) and written anew: the
weight is decoded by bitsandbytes' C functions into one buffer that all layers share (scales first,
then their offset, then codes); y = x W^T by cuBLAS, x A^T, and the product with B^T added in
place. In the backward pass the gradients of A and B, the weight decoded once more, dx = dy W, and
the adapter's part added in place. Projections of the same x share one dx; the MLP is one function
whose backward writes over what the forward left. What is not a product (norms, rotations, the
gate's forward, the loss) is qtune's own in the model that trains this way (peers.py).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import bitsandbytes.functional as bnb
import torch
from torch import Tensor, nn

from qtune_kernels.swiglu import gated, gated_backward

_buffers: dict[tuple[str, torch.device], Tensor] = {}


class Matrix(NamedTuple):
    """A frozen weight of bitsandbytes with the adapter on it."""

    packed: Tensor
    state: Any
    a: nn.Parameter
    b: nn.Parameter
    scaling: float

    @classmethod
    def of(cls, layer: Any) -> "Matrix":
        """The parts of PEFT's LoRA layer on a `Linear4bit`."""
        weight = layer.get_base_layer().weight
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        return cls(weight.data, weight.quant_state, a, b, layer.scaling["default"])

    def dense(self) -> Tensor:
        """The weight [O, I] in the buffer that the next call overwrites."""
        state = self.state
        if self.packed.device.type != "cuda":
            # the C functions below are for CUDA
            return bnb.dequantize_4bit(self.packed, state)
        stream = torch.cuda.current_stream().cuda_stream
        num = state.shape[0] * state.shape[1]
        scales = _buffer("scales", state.absmax.numel(), torch.float32, self.packed.device)
        weight = _buffer("weight", num, torch.bfloat16, self.packed.device)
        nested = state.state2
        bnb.lib.cdequantize_blockwise_fp32(
            *map(bnb.get_ptr, (nested.code, state.absmax, nested.absmax, scales)),
            nested.blocksize,
            scales.numel(),
            stream,
        )
        scales += state.offset
        bnb.lib.cdequantize_blockwise_bf16_nf4(
            *map(bnb.get_ptr, (None, self.packed, scales, weight)), state.blocksize, num, stream
        )
        return weight.view(state.shape)

    def forward(self, x: Tensor) -> Tensor:
        """y [T, O] of x [T, I]."""
        y = x @ self.dense().t()
        return y.addmm_(x @ self.a.t().to(x.dtype), self.b.t().to(x.dtype), alpha=self.scaling)

    def adapter_gradients(self, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of A and B."""
        a, b = self.a.to(x.dtype), self.b.to(x.dtype)
        da, db = torch.empty_like(a), torch.empty_like(b)
        da.t().addmm_(x.t(), dy @ b, alpha=self.scaling, beta=0)
        db.t().addmm_(a @ x.t(), dy, alpha=self.scaling, beta=0)
        return da, db

    def add_input_gradient(self, dx: Tensor | None, dy: Tensor) -> Tensor:
        """dx [T, I], or this matrix's part added to it in place."""
        dx = dy @ self.dense() if dx is None else dx.addmm_(dy, self.dense())
        a, b = self.a.to(dy.dtype), self.b.to(dy.dtype)
        return dx.addmm_(dy @ b, a, alpha=self.scaling)


def projections(matrices: Sequence[Matrix], x: Tensor) -> Tensor | tuple[Tensor, ...]:
    """The products of one x [..., I] with each matrix; a single one comes without a tuple."""
    outputs = _Projections.apply(x, matrices, *_adapters(matrices))
    return outputs[0] if len(matrices) == 1 else outputs


def mlp(gate: Matrix, up: Matrix, down: Matrix, x: Tensor) -> Tensor:
    """down(silu(gate(x)) up(x)), [..., I]."""
    return _Mlp.apply(x, (gate, up, down), *_adapters((gate, up, down)))


class _Projections(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, matrices: Sequence[Matrix], *adapters: Tensor) -> Any:
        ctx.matrices = matrices
        ctx.save_for_backward(x)
        rows = x.reshape(-1, x.shape[-1])
        return tuple(m.forward(rows).view(*x.shape[:-1], m.state.shape[0]) for m in matrices)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        rows, dx, gradients = x.reshape(-1, x.shape[-1]), None, []
        for matrix, slope in zip(ctx.matrices, slopes, strict=True):
            dy = slope.reshape(-1, slope.shape[-1])
            gradients += matrix.adapter_gradients(rows, dy)
            dx = matrix.add_input_gradient(dx, dy)
        assert dx is not None
        return dx.view_as(x), None, *gradients


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, matrices: Sequence[Matrix], *adapters: Tensor) -> Any:
        ctx.matrices = matrices
        gate, up, down = matrices
        rows = x.reshape(-1, x.shape[-1])
        e, g = gate.forward(rows), up.forward(rows)
        ctx.save_for_backward(x, e, g)
        return down.forward(gated(e, g, "silu")).view(x.shape)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        x, e, g = ctx.saved_tensors
        gate, up, down = ctx.matrices
        rows, dy = x.reshape(-1, x.shape[-1]), slope.reshape(-1, slope.shape[-1])
        h, de, dg = _gate_backward(down.add_input_gradient(None, dy), e, g)
        gradients = [*gate.adapter_gradients(rows, de), *up.adapter_gradients(rows, dg)]
        gradients += down.adapter_gradients(h, dy)
        dx = gate.add_input_gradient(up.add_input_gradient(None, dg), de)
        return dx.view_as(x), None, *gradients


def _gate_backward(dh: Tensor, e: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """h and the gradients of e and g; on CUDA in the memory of the three."""
    if dh.device.type != "cuda":
        return gated(e, g, "silu"), *gated_backward(dh, e, g, "silu")
    from gpu.unsloth_triton import gate_backward

    gate_backward(dh, e, g)
    return dh, e, g


def _adapters(matrices: Sequence[Matrix]) -> list[Tensor]:
    return [adapter for matrix in matrices for adapter in (matrix.a, matrix.b)]


def _buffer(role: str, num: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The first elements of a buffer that grows to the largest matrix."""
    held = _buffers.get((role, device))
    if held is None or held.numel() < num:
        held = _buffers[role, device] = torch.empty(num, dtype=dtype, device=device)
    return held[:num]
