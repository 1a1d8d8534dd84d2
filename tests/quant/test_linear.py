"""QuantLinear against the dequantized matrix in float64, and as a module among others."""

import copy
import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from qtune.quant.format import format_names, load_format
from qtune.quant.linear import TENSORS, QuantLinear, unpacked
from qtune.quant.weight import storage_bytes

NAMES = format_names()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# in, out: groups per row, rows that share groups, a tail, less than one group
SIZES = [(128, 192), (100, 33), (77, 13), (5, 3)]


def make(
    size: tuple[int, int] = (128, 192),
    dtype: torch.dtype = torch.float32,
    name: str = "nf4",
    bias: bool = True,
) -> QuantLinear:
    torch.manual_seed(0)
    return QuantLinear.from_linear(nn.Linear(*size, bias=bias, dtype=dtype), name, 64)


def step(layer: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """y and dx."""
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    y.backward(dy)
    assert x.grad is not None
    return y.detach(), x.grad


def stored(layer: nn.Module) -> dict[str, Tensor]:
    return {name: getattr(layer, name).detach().clone() for name in TENSORS}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward_and_dx_against_float64(
    size: tuple[int, int], dtype: torch.dtype, bias: bool, name: str
) -> None:
    layer = make(size, dtype, name, bias)
    dense = nn.Linear(*size, bias=bias, dtype=dtype)
    truth = nn.Linear(*size, bias=bias, dtype=torch.float64)
    dense.weight.data = layer.dequantize(dtype)
    truth.weight.data = layer.dequantize(torch.float32).double()
    if layer.bias is not None:
        dense.bias.data, truth.bias.data = layer.bias, layer.bias.double()
    x, dy = torch.randn(2, 7, size[0]).to(dtype), torch.randn(2, 7, size[1]).to(dtype)
    exact = step(truth, x.double(), dy.double())
    found, plain = step(layer, x, dy), step(dense, x, dy)
    for ours, theirs, right in zip(found, plain, exact, strict=True):
        assert ours.dtype == dtype and ours.shape == right.shape
        allowed = 2 * (theirs.double() - right).norm() + 1e-7 * right.norm()
        assert (ours.double() - right).norm() <= allowed


@pytest.mark.parametrize("name", NAMES)
def test_only_codes_are_kept_for_backward(name: str) -> None:
    layer = make(name=name)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = torch.randn(4, 128, requires_grad=True)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x)
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    assert kept
    assert all(tensor.untyped_storage().data_ptr() in own for tensor in kept)
    y.sum().backward()
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_everything_is_frozen_and_codes_are_bytes() -> None:
    layer = make()
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert not list(layer.buffers())
    assert all(getattr(layer, name).dtype == torch.uint8 for name in TENSORS)
    assert not layer(torch.randn(2, 128)).requires_grad


def test_a_trained_bias_gets_its_gradient() -> None:
    layer = make()
    assert layer.bias is not None
    layer.bias.requires_grad_()
    layer(torch.randn(2, 5, 128)).sum().backward()
    assert layer.bias.grad is not None
    assert torch.equal(layer.bias.grad, torch.full((192,), 10.0))


@pytest.mark.parametrize("shape", [(128,), (1, 128), (0, 128), (2, 3, 4, 128)], ids=str)
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    layer = make()
    dense = nn.Linear(128, 192)
    assert layer.bias is not None
    dense.weight.data, dense.bias.data = layer.dequantize(torch.float32), layer.bias
    x = torch.randn(shape)
    y, dx = step(layer, x, torch.ones(*shape[:-1], 192))
    expected, expected_dx = step(dense, x, torch.ones(*shape[:-1], 192))
    assert y.shape == expected.shape and dx.shape == x.shape
    assert torch.allclose(y, expected, atol=1e-5) and torch.allclose(dx, expected_dx, atol=1e-5)


def test_inputs_that_are_not_contiguous() -> None:
    layer, x = make(), torch.randn(128, 6)
    y, dx = step(layer, x.t(), torch.randn(192, 6).t())
    assert torch.allclose(y, layer(x.t().contiguous()), atol=1e-5)
    assert dx.shape == (6, 128)


def test_layers_do_not_share_results() -> None:
    # the temporary matrix is one buffer for all layers: results must not point into it
    first, second = make(), make((128, 192), name="int8")
    x = torch.randn(4, 128)
    y, weight = first(x), first.dequantize()
    kept = y.clone(), weight.clone()
    second(x)
    second.dequantize()
    assert torch.equal(y, kept[0]) and torch.equal(weight, kept[1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(reentrant: bool) -> None:
    block = nn.Sequential(make(), nn.SiLU(), make((192, 128)))
    x, dy = torch.randn(4, 128), torch.randn(4, 128)

    def checkpointed(x: Tensor) -> Tensor:
        result: Tensor = checkpoint(block, x, use_reentrant=reentrant)
        return result

    expected, found = step(block, x, dy), step(checkpointed, x, dy)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("name", NAMES)
def test_compiles_to_one_graph(name: str) -> None:
    block = nn.Sequential(make(name=name), nn.SiLU(), make((192, 128), name=name))
    x, dy = torch.randn(4, 128), torch.randn(4, 128)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    expected, found = step(block, x, dy), step(compiled, x, dy)
    assert torch.allclose(found[0], expected[0]) and torch.allclose(found[1], expected[1])


@pytest.mark.parametrize("name", NAMES)
def test_on_meta(name: str) -> None:
    layer = QuantLinear(100, 33, True, format_name=name, device="meta")
    sizes = storage_bytes(3300, load_format(name), 64)
    assert {n: getattr(layer, n).nbytes for n in TENSORS} == sizes
    y = layer(torch.empty(2, 5, 100, device="meta", dtype=torch.bfloat16, requires_grad=True))
    assert (y.device.type, y.shape, y.dtype) == ("meta", (2, 5, 33), torch.bfloat16)
    y.sum().backward()
    with torch.device("meta"):
        assert QuantLinear(100, 33, format_name=name).weight.is_meta


def test_from_linear_on_meta() -> None:
    layer = QuantLinear.from_linear(nn.Linear(100, 33, device="meta"), "nf4", 64)
    assert all(parameter.is_meta for parameter in layer.parameters())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_state_dict_round_trip(name: str, size: tuple[int, int]) -> None:
    layer = make(size, name=name)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = QuantLinear(*size, True, format_name=name, compute_dtype=torch.float32)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert same(stored(layer), stored(other))
    x = torch.randn(3, size[0])
    assert torch.equal(layer(x), other(x))


def test_another_size_does_not_load() -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        make((128, 64)).load_state_dict(make((128, 192)).state_dict())


def test_float32_scales_at_odd_places_of_a_file(tmp_path: Path) -> None:
    layer = make((64, 13))
    file = tmp_path / "model.safetensors"
    save_file(
        {f"{i}.{key}": t.clone() for i in range(3) for key, t in layer.state_dict().items()}, file
    )
    loaded = load_file(file)
    starts = [loaded[f"{i}.scale_scales"].data_ptr() % 4 for i in range(3)]
    assert any(starts), "the test is to have tensors that are not aligned"
    for i in range(3):
        other = QuantLinear(64, 13, True, compute_dtype=torch.float32, device="meta")
        mine = {key: loaded[f"{i}.{key}"] for key in layer.state_dict()}
        other.load_state_dict(mine, strict=True, assign=True)
        x = torch.randn(3, 64)
        assert torch.equal(other(x), layer(x))


def test_deepcopy() -> None:
    layer = make()
    twin = copy.deepcopy(layer)
    assert same(stored(layer), stored(twin))
    twin.quantize(torch.zeros(192, 128))
    assert not same(stored(layer), stored(twin))
    assert layer.dequantize().any() and not twin.dequantize().any()


CASTS: dict[str, Callable[[nn.Module], Any]] = {
    "to(bfloat16)": lambda m: m.to(torch.bfloat16),
    "to(device, dtype)": lambda m: m.to("cpu", torch.float16),
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "float": lambda m: m.float(),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_casts_leave_codes_and_scales_alone(cast: Callable[[nn.Module], Any]) -> None:
    layer = make()
    before, x = stored(layer), torch.randn(3, 128)
    weight = layer.dequantize(torch.float32)
    cast(nn.Sequential(layer))
    assert same(before, stored(layer))
    assert torch.equal(layer.dequantize(torch.float32), weight)
    assert layer(x).dtype == torch.float32


def test_to_another_device() -> None:
    layer = make().to("meta")
    assert all(parameter.is_meta for parameter in layer.parameters())
    empty = layer.to_empty(device="cpu")
    empty.load_state_dict(make().state_dict())
    x = torch.randn(2, 128)
    assert torch.equal(empty(x), make()(x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_to_cuda_and_back() -> None:
    layer, x = make(dtype=torch.bfloat16), torch.randn(4, 128, dtype=torch.bfloat16)
    before, y = stored(layer), layer(x)
    on_gpu = layer.cuda()(x.cuda()).cpu()
    assert torch.allclose(on_gpu, y, atol=0.05)
    assert same(before, stored(layer.cpu()))


def test_dtype_of_dequantize() -> None:
    layer = make(dtype=torch.bfloat16)
    assert layer.dequantize().dtype == torch.bfloat16
    exact = layer.dequantize(torch.float32)
    assert torch.equal(exact.to(torch.bfloat16), layer.dequantize())
    assert exact.shape == (192, 128)


def test_what_other_libraries_ask_of_it() -> None:
    layer = make((128, 192))
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (128, 192)
    assert layer.W_q is layer.weight
    before = stored(layer)
    layer.reset_parameters()
    assert same(before, stored(layer))
    assert "format=nf4, group_size=64" in repr(layer)


def test_half_precision_layer_keeps_its_bias() -> None:
    dense = nn.Linear(64, 64, dtype=torch.bfloat16)
    layer = QuantLinear.from_linear(dense, "nf4", 64)
    assert layer.bias is not None and torch.equal(layer.bias, dense.bias)
    assert layer.compute_dtype == torch.bfloat16 and not layer.bias.requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_unpacked_weights_give_the_same_bits(name: str) -> None:
    layer = QuantLinear.from_linear(nn.Linear(100, 33).bfloat16(), name, 64)
    x = torch.randn(5, 100).bfloat16()
    y = layer(x)
    with unpacked(nn.Sequential(layer)):
        assert layer.dense is not None
        assert torch.equal(layer(x), y)
        assert layer(x.float()).dtype == torch.float32
        assert set(layer.state_dict()) == {*TENSORS, "bias"}
    assert layer.dense is None


def test_no_weights_are_unpacked_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = QuantLinear.from_linear(nn.Linear(64, 64), "nf4", 64)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1))
    with unpacked(layer):
        assert layer.dense is None
