"""The E8P layer against dense matrices in float64, alone and under PEFT."""

import copy

import pytest
import torch
from torch import nn

from qtune.errors import UserError
from qtune.quant.linear import QuantLinear, unpacked
from qtune.quant.storage import Storage
from qtune.quant.vector_linear import VectorLinear, layer_type
from qtune_kernels.e8p_book import STEP, decode_words
from qtune_kernels.hadamard import hadamard

E8P = Storage(format="e8p")


def dense(shape: tuple[int, int] = (96, 64), bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(shape[1], shape[0], bias)


def rotation(width: int, seed: int = 0) -> torch.Tensor:
    return hadamard(torch.eye(width, dtype=torch.float64), seed=seed)


def test_layers_of_vectors_are_of_this_class() -> None:
    assert layer_type(E8P) is VectorLinear
    assert layer_type(Storage(format="int2")) is QuantLinear


def test_the_weight_is_that_of_the_words_rotated_back_on_both_sides() -> None:
    layer = VectorLinear.from_linear(dense(), E8P)
    words = layer.weight.detach()[: 96 * 64 // 4].view(torch.int16).int() & 0xFFFF
    inner = decode_words(words).double().view(96, 64) * STEP
    inner *= layer.scale_codes.detach().view(torch.float32).double()
    expected = rotation(96, 1) @ inner @ rotation(64).T
    torch.testing.assert_close(
        layer.dequantize(torch.float32).double(), expected, atol=1e-6, rtol=0
    )
    torch.testing.assert_close(layer.dequantize_inner(torch.float32), inner.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_those_of_the_dense_weight(dtype) -> None:
    layer = VectorLinear.from_linear(dense().to(dtype), E8P)
    weight = layer.dequantize(torch.float32)
    x = torch.randn(2, 5, 64, dtype=dtype, requires_grad=True)
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    # three roundings to the dtype: of rotated inputs, of their product, of rotated outputs
    off = 4 * torch.finfo(dtype).eps
    expected = x.float() @ weight.T + layer.bias.float()
    assert y.dtype == dtype
    assert (y - expected).norm() < off * expected.norm()
    assert (x.grad - dy.float() @ weight).norm() < off * (dy.float() @ weight).norm()


def test_normal_weights_lose_92_thousandths() -> None:
    plain = dense((192, 576))
    nn.init.normal_(plain.weight)
    # a strong output, which rotating spreads
    weight = plain.weight.data
    weight[7] *= 20
    layer = VectorLinear.from_linear(plain, E8P)
    lost = (layer.dequantize(torch.float32) - weight).square().sum() / weight.square().sum()
    assert lost == pytest.approx(0.092, abs=0.004)


def test_it_takes_two_bits_and_a_few_bytes() -> None:
    layer = VectorLinear(576, 192, storage=E8P, device="meta")
    stored = sum(getattr(layer, name).nbytes for name in layer.tensor_names)
    assert stored == 576 * 192 // 4 + 4
    assert all(p.dtype == torch.uint8 and not p.requires_grad for p in layer.parameters())


def test_other_storage_does_not_matter() -> None:
    layer = VectorLinear(64, 96, storage=Storage(format="e8p", group_size=16), device="meta")
    assert layer.storage.group_size == "tensor" and layer.storage.rotated


def test_rows_that_are_no_whole_vectors_are_refused() -> None:
    with pytest.raises(UserError, match="a row of 60 is not a multiple; give that layer another"):
        VectorLinear(60, 8, storage=E8P)


def test_a_loaded_state_computes_the_same_bits() -> None:
    layer = VectorLinear.from_linear(dense(), E8P)
    other = VectorLinear(64, 96, True, storage=E8P, compute_dtype=torch.float32)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 64)
    assert torch.equal(layer(x), other(x))


def test_unpacked_layers_compute_the_same() -> None:
    layer = VectorLinear.from_linear(dense(), E8P)
    x = torch.randn(3, 64)
    expected = layer(x)
    with unpacked(layer):
        assert layer.dense is not None
        torch.testing.assert_close(layer(x), expected)


def test_inner_matrices_belong_to_inner_inputs() -> None:
    layer = VectorLinear.from_linear(dense(), E8P)
    x, a = torch.randn(5, 64), torch.randn(3, 64)
    torch.testing.assert_close(layer.inner_input(x) @ layer.inner_a(a).T, x @ a.T)
    weight = layer.dequantize(torch.float32)
    torch.testing.assert_close(layer.inner_weight(weight), layer.dequantize_inner(torch.float32))
    hessian = x.T @ x
    inner = layer.inner_input(x)
    torch.testing.assert_close(layer.inner_hessian(hessian), inner.T @ inner)


def test_adapters_train_on_it_by_the_path_of_peft() -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = nn.Sequential(VectorLinear.from_linear(dense(), E8P))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
    wrapped = model.base_model.model[0]
    x = torch.randn(5, 64, requires_grad=True)
    y = model(x)
    a, b = wrapped.lora_A["default"].weight, wrapped.lora_B["default"].weight
    plain = wrapped.base_layer
    update = wrapped.scaling["default"] * b @ a
    weight = plain.dequantize(torch.float32) + update
    torch.testing.assert_close(y, x @ weight.T + plain.bias, atol=1e-5, rtol=1e-5)
    y.square().sum().backward()
    gradient = 2 * (y.T @ x) @ a.T * wrapped.scaling["default"]
    torch.testing.assert_close(b.grad, gradient.detach(), atol=1e-3, rtol=1e-4)
    before = copy.deepcopy(plain.state_dict())
    merged = model.merge_and_unload()[0]
    torch.testing.assert_close(merged.weight, weight.detach(), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
