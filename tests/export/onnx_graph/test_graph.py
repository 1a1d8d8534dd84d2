"""Tensors go into the data file as they are, and the model file says where."""

from pathlib import Path

import pytest
import torch

onnx = pytest.importorskip("onnx")

from qtune.export.onnx_graph.graph import ALIGNMENT, DATA, MODEL, Graph  # noqa: E402


def test_weights_are_found_where_the_model_says(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "c": torch.arange(9, dtype=torch.uint8),
    }
    with (tmp_path / DATA).open("wb") as data:
        graph = Graph(data)
        graph.input("x", onnx.TensorProto.FLOAT, ["rows", 5])
        for name, tensor in tensors.items():
            assert graph.weight(name, tensor) == name
        # named again: tied weights are written once
        graph.weight("a", tensors["a"])
        graph.constant("axes", [1])
        made = graph.output("y", onnx.TensorProto.FLOAT, ["rows", 1])
        graph.op("ReduceSum", ["x", "axes"], made)
        graph.save(tmp_path)
    places = {
        weight.name: {entry.key: entry.value for entry in weight.external_data}
        for weight in onnx.load(tmp_path / MODEL, load_external_data=False).graph.initializer
    }
    content = (tmp_path / DATA).read_bytes()
    assert places.keys() == {*tensors, "axes"} and places.pop("axes") == {}
    for name, place in places.items():
        at, length = int(place["offset"]), int(place["length"])
        stored = tensors[name].contiguous().view(torch.uint8).flatten()
        assert content[at : at + length] == bytes(stored.tolist()) and at % ALIGNMENT == 0
    onnx.checker.check_model(tmp_path / MODEL)
