"""What runs on CUDA, on CPU tensors with the kernels in the interpreter."""

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from samples import COUNTED, NF4, Sample, Variant, error, sample
from torch import Tensor
from torch.library import CustomOpDef

from qtune_kernels import lora, lora_cuda, norm, rows, swiglu
from qtune_kernels import lora_products as products
from qtune_kernels.lora_products import Weight
from qtune_kernels.rows import with_room

dequantize_triton = pytest.importorskip("qtune_kernels.dequantize_triton")

# PyTorch's bf16 product on the CPU reads beyond rows that lie apart and are no multiple of 8
OUT, IN, RANK, SCALING = 40, 256, 8, 1.5
KINDS = pytest.mark.parametrize(
    ("levels", "variant"),
    [(NF4, Variant()), ((), Variant()), (COUNTED["int4"], Variant("linear", "codes"))],
    ids=["4 bits", "8 bits", "zeros"],
)
# fused for few rows, fused, dequantized
NUM_ROWS = pytest.mark.parametrize("num_rows", [3, 20, 300])
ROOM = pytest.mark.parametrize("room", [0, RANK], ids=["no room", "room"])


def weight_of(made: Sample) -> Weight:
    shape = (made.weights.shape[0], made.weights.shape[1])
    return Weight(made.packed, made.scales, made.levels, made.group_size, shape)


def random_rows(num_rows: int, width: int, room: int, device: torch.device) -> Tensor:
    """Random rows, with room behind them or without."""
    if room == 0:
        return torch.randn(num_rows, width, device=device).bfloat16()
    made = with_room(num_rows, width, torch.bfloat16, device, room)
    return made.copy_(torch.randn(num_rows, width))


@KINDS
@NUM_ROWS
@ROOM
def test_forward(room: int, num_rows: int, levels, variant, device) -> None:
    made = sample((OUT, IN), levels, variant=variant).to(device)
    x = random_rows(num_rows, IN, room, device)
    before = x.clone()
    bias = torch.randn(OUT, device=device).bfloat16()
    a, b = torch.randn(RANK, IN, device=device) / 16, torch.randn(OUT, RANK, device=device) / 4
    y, u = lora_cuda.forward(x, weight_of(made), bias, a, b, SCALING)
    wide = x.double()
    truth = wide @ made.weights.T + bias.double() + SCALING * (wide @ a.double().T) @ b.double().T
    narrow = before @ a.bfloat16().T
    plain = before @ made.weights.bfloat16().T + bias + SCALING * (narrow @ b.bfloat16().T)
    assert error(y, truth) <= 2 * error(plain, truth)
    assert error(u, narrow.double()) < 1e-3 and torch.equal(x, before)


@KINDS
@NUM_ROWS
@ROOM
def test_input_gradient(room: int, num_rows: int, levels, variant, device) -> None:
    made = sample((OUT, IN), levels, variant=variant).to(device)
    dy, v = random_rows(num_rows, OUT, room, device), random_rows(num_rows, RANK, 0, device)
    a = torch.randn(RANK, IN, device=device) / 16
    before = dy.clone()
    dx = lora_cuda.input_gradient(dy, v, weight_of(made), a)
    truth = dy.double() @ made.weights + v.double() @ a.double()
    plain = before @ made.weights.bfloat16() + v @ a.bfloat16()
    assert error(dx, truth) <= 2 * error(plain, truth)
    assert torch.equal(dy, before)


@pytest.mark.parametrize(
    ("num_rows", "room", "expected"),
    [(3, 8, "fused"), (300, 8, "extended"), (300, 4, "added"), (300, 0, "added")],
)
def test_the_choice(num_rows: int, room: int, expected: str, device, monkeypatch) -> None:
    taken = []
    monkeypatch.setattr(products, "forward", lambda *rest: taken.append("added"))
    monkeypatch.setattr(products, "forward_extended", lambda *rest: taken.append("extended"))
    made = sample((OUT, IN)).to(device)
    x = random_rows(num_rows, IN, room, device)
    a, b = torch.ones(RANK, IN), torch.ones(OUT, RANK)
    lora_cuda.forward(x, weight_of(made), None, a.to(device), b.to(device), SCALING)
    assert (taken or ["fused"]) == [expected]


def on_cuda(op: CustomOpDef, *arguments: Any) -> Any:
    """What the op's function for CUDA makes of these, wherever they are."""
    function = torch.library.get_kernel(op._opoverload, "CUDA")
    return function.call_boxed(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *arguments)


class Layer:
    """A linear layer with its adapter, run by the ops' functions for CUDA."""

    def __init__(self, out_features: int, in_features: int, device: torch.device) -> None:
        made = sample((out_features, in_features)).to(device)
        self.weight = made.packed, *made.scales, list(made.levels), made.group_size
        self.out_features = out_features
        self.a = torch.randn(RANK, in_features, device=device) / 16
        self.b = torch.randn(out_features, RANK, device=device) / 4

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        adapter = None, self.a, self.b, SCALING
        return on_cuda(lora.lora_linear_forward, x, *self.weight, self.out_features, *adapter)

    def gradients(self, dy: Tensor, x: Tensor, u: Tensor) -> list[Tensor]:
        adapter = self.a, self.b, SCALING, True
        return list(on_cuda(lora.lora_linear_backward, dy, x, u, *self.weight, *adapter))


def mlp(layers: list[Layer], x: Tensor, dy: Tensor, room: int) -> list[Tensor]:
    """What a norm and the MLP behind it give, and gradients of the MLP's input and adapters."""
    gate_layer, up_layer, down_layer = layers
    weight = torch.ones(x.shape[-1], dtype=x.dtype, device=x.device)
    normal = on_cuda(norm.rms_norm, x, weight, 1e-5, 0.0, room)
    (gate, gate_u), (up, up_u) = gate_layer.forward(normal), up_layer.forward(normal)
    h = on_cuda(swiglu.gated, gate, up, "silu", room)
    y, down_u = down_layer.forward(h)
    dh, *down = down_layer.gradients(dy, h, down_u)
    dgate, dup = on_cuda(swiglu.gated_backward, dh, gate, up, "silu", room)
    results = [normal, gate, up, h, y, dgate, dup, *down]
    results += gate_layer.gradients(dgate, normal, gate_u)
    return results + up_layer.gradients(dup, normal, up_u)


def test_room_from_norm_to_mlp_changes_nothing_but_roundings(device, monkeypatch) -> None:
    monkeypatch.setattr(rows, "DEVICE", device.type)
    forward, backward = (
        Mock(wraps=run) for run in (products.forward_extended, products.input_gradient_extended)
    )
    monkeypatch.setattr(products, "forward_extended", forward)
    monkeypatch.setattr(products, "input_gradient_extended", backward)
    layers = [Layer(*shape, device) for shape in ((128, IN), (128, IN), (IN, 128))]
    # few rows are dequantized for too, in float32
    x, dy = (torch.randn(2, 3, IN, device=device) for _ in range(2))
    plain = mlp(layers, x, dy, 0)
    assert forward.call_count == backward.call_count == 0
    for one, other in zip(mlp(layers, x, dy, RANK), plain, strict=True):
        assert one.shape == other.shape and error(one, other.double()) < 1e-5
    assert (forward.call_count, backward.call_count) == (3, 2)


@pytest.mark.parametrize("levels", [NF4, NF4[::2], NF4[::4], ()], ids=["4", "3", "2", "8"])
@pytest.mark.parametrize("group_size", [16, 64, 256])
@pytest.mark.parametrize("shape", [(45, 384), (300, 192)], ids=str)
def test_weights_are_dequantized_between_other_columns(shape, group_size, levels, device) -> None:
    made = sample(shape, levels, group_size).to(device)
    buffer = torch.full((shape[0], shape[1] + 24), torch.nan, device=device)
    inside = buffer[:, : shape[1]]
    assert dequantize_triton.reaches(inside, group_size)
    dequantize_triton.dequantize_into(inside, *weight_of(made)[:-1])
    assert error(inside, made.weights) < 1e-6
    assert buffer[:, shape[1] :].isnan().all()


def test_rows_that_are_no_whole_units_are_out_of_reach() -> None:
    assert dequantize_triton.reaches(torch.empty(5, 100), 64)
    assert not dequantize_triton.reaches(torch.empty(5, 108)[:, :100], 64)
    assert not dequantize_triton.reaches(torch.empty(5, 130)[:, :128], 64)
    assert not dequantize_triton.reaches(torch.empty(128, 5).T, 64)
