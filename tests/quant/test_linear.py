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

from qtune.quant.format import Params, format_names
from qtune.quant.linear import QuantLinear, unpacked
from qtune.quant.storage import Storage
from qtune.quant.weight import fit, storage_bytes
from qtune_kernels.packing import unpack

# e8p is a layer of its own kind
NAMES = [name for name in format_names() if name != "e8p"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# in, out: groups per row, rows that share groups, a tail, less than one group
SIZES = [(128, 192), (100, 33), (77, 13), (5, 3)]


STORAGES: dict[str, Storage] = {
    **{name: Storage(name) for name in NAMES},
    "rotated": Storage("int4", rotated=True),
    "channels": Storage("int4", channels=True),
    "rotated channels": Storage("nf4", rotated=True, channels=True),
    "half": Storage("int3", scales="half", zeros="half"),
    "float": Storage("lm4", scales="float", zeros="float"),
    "row": Storage("int8", "row"),
    "tensor": Storage("int4_sym", "tensor"),
    "32": Storage("int2", 32),
    "rotated halves in rows": Storage("int2_sym", "row", rotated=True, scales="half"),
}
EVERY = pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)
INNER = pytest.mark.parametrize(
    "storage",
    [
        Storage(name, rotated=rotated, channels=channels)
        for name in ("int4", "nf4")
        for rotated in (False, True)
        for channels in (False, True)
    ],
    ids=str,
)


def make(
    size: tuple[int, int] = (128, 192),
    dtype: torch.dtype = torch.float32,
    storage: Storage = STORAGES["nf4"],
    bias: bool = True,
) -> QuantLinear:
    torch.manual_seed(0)
    dense = nn.Linear(*size, bias=bias, dtype=dtype)
    layer = QuantLinear.from_linear(dense, storage)
    if storage.channels:
        layer.load(layer.pack(dense.weight, torch.rand(size[0]) + 0.5))
    return layer


def step(layer: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """y and dx."""
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    y.backward(dy)
    assert x.grad is not None
    return y.detach(), x.grad


def stored(layer: QuantLinear) -> dict[str, Tensor]:
    return {name: getattr(layer, name).detach().clone() for name in layer.tensor_names}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward_and_dx_against_float64(
    size: tuple[int, int], dtype: torch.dtype, storage: Storage
) -> None:
    bias = size[0] % 2 == 0
    layer = make(size, dtype, storage, bias)
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
        allowed = 2 * (theirs.double() - right).norm() + 1e-6 * right.norm()
        if storage.rotated or storage.channels:
            # inner inputs are rounded once more, and again where they are rotated
            allowed += 2 * torch.finfo(dtype).eps * right.norm()
        assert (ours.double() - right).norm() <= allowed


@EVERY
def test_only_what_is_stored_is_kept_for_backward(storage: Storage) -> None:
    layer = make(storage=storage)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = torch.randn(4, 128, requires_grad=True)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x)
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    assert kept
    assert all(t.untyped_storage().data_ptr() in own or not t.numel() for t in kept)
    y.sum().backward()
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_everything_is_frozen_and_codes_are_bytes() -> None:
    layer = make()
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert not list(layer.buffers())
    assert all(getattr(layer, name).dtype == torch.uint8 for name in layer.tensor_names)
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
    first, second = make(), make((128, 192), storage=Storage("int8"))
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


@pytest.mark.parametrize("name", ["nf4", "int8", "rotated channels", "half"])
def test_compiles_to_one_graph(name: str) -> None:
    torch.compiler.reset()
    storage = STORAGES[name]
    block = nn.Sequential(make(storage=storage), nn.SiLU(), make((192, 128), storage=storage))
    x, dy = torch.randn(4, 128), torch.randn(4, 128)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    expected, found = step(block, x, dy), step(compiled, x, dy)
    assert torch.allclose(found[0], expected[0], atol=1e-6)
    assert torch.allclose(found[1], expected[1], atol=1e-6)


@EVERY
def test_on_meta(storage: Storage) -> None:
    layer = QuantLinear(100, 33, True, storage=storage, device="meta")
    sizes = storage_bytes((33, 100), storage)
    assert {n: getattr(layer, n).nbytes for n in layer.tensor_names} == sizes
    y = layer(torch.empty(2, 5, 100, device="meta", dtype=torch.bfloat16, requires_grad=True))
    assert (y.device.type, y.shape, y.dtype) == ("meta", (2, 5, 33), torch.bfloat16)
    y.sum().backward()
    with torch.device("meta"):
        assert QuantLinear(100, 33, storage=storage).weight.is_meta


def test_from_linear_on_meta() -> None:
    layer = QuantLinear.from_linear(nn.Linear(100, 33, device="meta"))
    assert all(parameter.is_meta for parameter in layer.parameters())


@EVERY
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_state_dict_round_trip(storage: Storage, size: tuple[int, int]) -> None:
    layer = make(size, storage=storage)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = QuantLinear(*size, True, storage=storage, compute_dtype=torch.float32)
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
    assert "format='nf4', group_size=64" in repr(layer)


def test_half_precision_layer_keeps_its_bias() -> None:
    dense = nn.Linear(64, 64, dtype=torch.bfloat16)
    layer = QuantLinear.from_linear(dense)
    assert layer.bias is not None and torch.equal(layer.bias, dense.bias)
    assert layer.compute_dtype == torch.bfloat16 and not layer.bias.requires_grad


@EVERY
def test_unpacked_weights_give_the_same_bits(storage: Storage) -> None:
    layer = QuantLinear.from_linear(nn.Linear(100, 33).bfloat16(), storage)
    x = torch.randn(5, 100).bfloat16()
    y = layer(x)
    with unpacked(nn.Sequential(layer)):
        assert layer.dense is not None
        assert torch.equal(layer(x), y)
        assert layer(x.float()).dtype == torch.float32
        assert set(layer.state_dict()) == {*layer.tensor_names, "bias"}
    assert layer.dense is None


def test_no_weights_are_unpacked_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = QuantLinear.from_linear(nn.Linear(64, 64))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1))
    with unpacked(layer):
        assert layer.dense is None


def rotation(size: int) -> Tensor:
    """R, float64 [I, I], of a layer whose weight is not changed by anything but it."""
    layer = QuantLinear(size, 1, storage=Storage(rotated=True), device="meta")
    return layer.inner_input(torch.eye(size, dtype=torch.float64))


@INNER
def test_inner_weights_and_inputs_have_the_product_of_the_plain(storage: Storage) -> None:
    layer = make((96, 40), storage=storage)
    x, weight = torch.randn(3, 7, 96), torch.randn(40, 96)
    inner = layer.inner_input(x) @ layer.inner_weight(weight).T
    assert torch.allclose(inner, x @ weight.T, atol=1e-4)
    plain = not (storage.rotated or storage.channels)
    assert plain == torch.equal(layer.inner_input(x), x)
    assert plain == (layer.inner_weight(weight) is weight)


@INNER
def test_inner_weight_and_hessian_against_matrices(storage: Storage) -> None:
    layer, eye = make((96, 40), storage=storage), torch.eye(96, dtype=torch.float64)
    factors = torch.ones(96, dtype=torch.float64)
    if layer.channel_factors is not None:
        factors = layer.channel_factors.double()
    forward = factors.diag() @ (rotation(96) if storage.rotated else eye)
    x, weight = torch.randn(200, 96).double(), torch.randn(40, 96).double()
    assert torch.allclose(layer.inner_input(x), x @ forward)
    found = layer.inner_weight(weight.float()).double()
    assert torch.allclose(found, weight @ torch.linalg.inv(forward).T, atol=1e-5)
    hessian = x.T @ x / 200
    expected = forward.T @ hessian @ forward
    assert torch.allclose(layer.inner_hessian(hessian.float()).double(), expected, atol=1e-5)


@INNER
def test_dequantized_is_what_the_inner_weight_does(storage: Storage) -> None:
    layer = make((96, 40), storage=storage, bias=False)
    x = torch.randn(3, 96)
    inner = layer.dequantize_inner(torch.float32)
    back = layer.dequantize(torch.float32)
    assert torch.allclose(layer.inner_weight(back), inner, atol=1e-6)
    assert torch.allclose(layer(x), x @ back.T, atol=1e-5)


@INNER
def test_an_adapter_sees_plain_inputs(storage: Storage) -> None:
    layer = make((96, 40), storage=storage)
    x, a = torch.randn(5, 96), torch.randn(4, 96, requires_grad=True)
    u = layer.inner_input(x) @ layer.inner_a(a).T
    assert torch.allclose(u, x @ a.T, atol=1e-4)
    du = torch.randn(5, 4)
    (da,) = torch.autograd.grad(u, a, du)
    assert torch.allclose(da, du.T @ x, atol=1e-4)
    half = layer.inner_a(a.bfloat16())
    assert half.dtype == torch.bfloat16


@EVERY
def test_settled_and_stored_is_packed(storage: Storage) -> None:
    torch.manual_seed(0)
    weight, factors = torch.randn(40, 96), torch.rand(96) + 0.5
    layer = make((96, 40), storage=storage, bias=False)
    channels = factors if storage.channels else None
    packed = layer.pack(weight, channels)
    inner = layer.inner_weight(weight, channels)
    settled = layer.settle(fit(inner.flatten(), layer.format, layer.group_size))
    codes = unpack(packed["weight"], layer.format.bits, 40 * 96).view(40, 96)
    stored = layer.store(codes, settled, channels)
    assert stored.keys() == packed.keys() == set(layer.tensor_names)
    assert all(torch.equal(stored[name], packed[name]) for name in stored)
    assert settled.params.scales.shape == (-(-40 * 96 // layer.group_size),)


def test_codes_and_parameters_decode_as_they_were_stored() -> None:
    layer = make((128, 8), storage=Storage("int3"), bias=False)
    codes = torch.randint(0, 8, (8, 128), dtype=torch.uint8)
    settled = layer.settle(Params(torch.rand(16) * 0.1 + 0.05, torch.randint(0, 8, (16,)).float()))
    layer.load(layer.store(codes, settled))
    scales, zeros = settled.params
    assert zeros is not None
    expected = (codes.view(16, 64).double() - zeros.double()[:, None]) * scales.double()[:, None]
    found = layer.dequantize(torch.float32).double().view(16, 64)
    assert torch.allclose(found, expected, rtol=1e-6)


def test_channel_factors_are_stored_as_halves_and_kept() -> None:
    layer = make((96, 40), storage=Storage("int4", channels=True), bias=False)
    weight = torch.randn(40, 96)
    factors = torch.linspace(0.1, 3, 96)
    layer.load(layer.pack(weight, factors))
    assert layer.channel_factors is not None
    assert torch.equal(layer.channel_factors, factors.half())
    layer.quantize(weight * 2)
    assert torch.equal(layer.channel_factors, factors.half())
    layer.load(layer.pack(weight))
    assert torch.equal(layer.channel_factors, torch.ones(96).half())
    assert (layer.dequantize(torch.float32) - weight).norm() < 0.12 * weight.norm()


@pytest.mark.parametrize("group_size", [32, "row"])
def test_int8_activations_against_exact_products(group_size: Any) -> None:
    storage = Storage("int8", group_size, activations="int8", outliers=6.0)
    layer = make((128, 192), torch.bfloat16, storage)
    x = torch.randn(9, 128).bfloat16()
    x[:, 5] *= 40
    weight = layer.dequantize(torch.float32).double()
    assert layer.bias is not None
    exact = x.double() @ weight.T + layer.bias.double()
    y, dx = step(layer, x, torch.ones(9, 192).bfloat16())
    assert (y.double() - exact).norm() < 0.02 * exact.norm()
    assert torch.allclose(dx.double(), weight.sum(0).expand(9, -1), atol=0.05)
    with_outlier = make((128, 192), torch.bfloat16, Storage("int8", activations="int8", outliers=0))
    assert (with_outlier(x).double() - exact).norm() > 2 * (y.double() - exact).norm()
    assert not layer.fuses_adapter and make().fuses_adapter
    with unpacked(layer):
        assert layer.dense is None
