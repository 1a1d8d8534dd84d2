"""One layer in ONNX Runtime, against its own dequantized weight."""

import io
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from qtune.errors import UserError
from qtune.model.lora import register
from qtune.quant.linear import QuantLinear
from qtune.quant.storage import Storage

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from qtune.export.onnx_graph.graph import Graph  # noqa: E402
from qtune.export.onnx_graph.linear import FORMATS, MOVABLE, linear, packed_rows  # noqa: E402

FLOAT = onnx.TensorProto.FLOAT


def product(layer: nn.Module, x: Tensor, folder: Path) -> Tensor:
    """What the nodes of the layer make of x."""
    with (folder / "model.onnx.data").open("wb") as data, torch.no_grad():
        graph = Graph(data)
        graph.input("x", FLOAT, ["rows", x.shape[-1]])
        y = linear(graph, "x", "layer", layer)
        graph.op("Identity", [y], graph.output("y", FLOAT, None))
        graph.save(folder)
    session = onnxruntime.InferenceSession(
        folder / "model.onnx", providers=["CPUExecutionProvider"]
    )
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def quantized(inputs: int = 192, outputs: int = 48, **storage: object) -> QuantLinear:
    torch.manual_seed(0)
    dense = nn.Linear(inputs, outputs)
    return QuantLinear.from_linear(dense, Storage(**storage))  # type: ignore[arg-type]


@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("format", FORMATS)
def test_codes_are_those_of_the_layer(format: str, group_size: int, tmp_path: Path) -> None:
    layer, x = quantized(format=format, group_size=group_size), torch.randn(5, 192)
    expected = x.double() @ layer.dequantize(torch.float32).double().T + layer.bias.double()
    found = product(layer, x, tmp_path)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("kind", ["half", "float"])
@pytest.mark.parametrize("format", MOVABLE)
def test_trained_zero_points_are_those_of_the_layer(format: str, kind: str, tmp_path: Path) -> None:
    layer, x = quantized(format=format, zeros=kind), torch.randn(5, 192)
    number = 192 * 48 // 64
    whole = layer.quant_weight.scales.zeros.float()
    moved = (whole + torch.rand(number)).to(torch.float16 if kind == "half" else torch.float32)
    layer.zeros = nn.Parameter(moved.view(torch.uint8), requires_grad=False)
    expected = x.double() @ layer.dequantize(torch.float32).double().T + layer.bias.double()
    found = product(layer, x, tmp_path)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("scales", ["half", "float", "dynamic"])
def test_scales_of_every_kind_are_those_of_the_layer(scales: str, tmp_path: Path) -> None:
    layer, x = quantized(format="int4", scales=scales), torch.randn(5, 192)
    expected = x.double() @ layer.dequantize(torch.float32).double().T + layer.bias.double()
    found = product(layer, x, tmp_path)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_groups_of_tables_may_end_inside_of_rows(tmp_path: Path) -> None:
    layer, x = quantized(inputs=96, outputs=64), torch.randn(3, 96)
    expected = x @ layer.dequantize(torch.float32).T + layer.bias
    assert torch.allclose(product(layer, x, tmp_path), expected, atol=1e-5)


@pytest.mark.parametrize("base", ["quantized", "dense"])
def test_an_adapter_is_two_small_products(base: str, tmp_path: Path) -> None:
    register()
    layer = quantized() if base == "quantized" else nn.Linear(192, 48)
    model = nn.ModuleDict({"layer": layer})
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=6, target_modules=["layer"]), model)
    wrapped = model["layer"]
    nn.init.normal_(wrapped.lora_B["default"].weight)
    x = torch.randn(5, 192)
    with torch.no_grad():
        expected = wrapped.eval()(x)
    assert torch.allclose(product(wrapped, x, tmp_path), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("layer", "problem"),
    [
        (quantized(format="lm4"), "lm4"),
        (quantized(format="nf4", rotated=True), "rotated"),
        (quantized(format="int4", channels=True), "factors"),
        (quantized(format="int4", group_size="row"), "powers of two"),
        (quantized(format="int4", inputs=96), "do not divide its 96"),
        (quantized(format="nf4", zeros="float"), "zero points of nf4"),
        (quantized(format="int8", zeros="half"), "zero points of int8"),
    ],
)
def test_what_has_no_nodes_is_refused_by_name(
    layer: QuantLinear, problem: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=rf"^layer: .*{problem}"):
        product(layer, torch.randn(1, 192), tmp_path)


def test_another_kind_of_adapter_is_refused(tmp_path: Path) -> None:
    model = nn.ModuleDict({"layer": nn.Linear(192, 48)})
    config = LoraConfig(r=4, use_dora=True, target_modules=["layer"])
    inject_adapter_in_model(config, model)
    with pytest.raises(UserError, match="merged form"):
        product(model["layer"], torch.randn(1, 192), tmp_path)


@pytest.mark.parametrize(("bits", "expected"), [(2, [0b11_10_01_00, 1]), (4, [0x10, 0x32, 0x01])])
def test_low_bits_come_first_and_rows_end_with_a_byte(bits: int, expected: list[int]) -> None:
    codes = torch.tensor([[0, 1, 2, 3, 1]], dtype=torch.uint8)
    assert packed_rows(codes, bits).tolist() == [expected]
    assert packed_rows(codes, 8).tolist() == codes.tolist()


def test_a_disk_that_is_full_is_named() -> None:
    class Full(io.BytesIO):
        def write(self, data: object) -> int:
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space"):
        Graph(Full()).weight("w", torch.zeros(3))
