"""An ONNX graph while it is put together, its weights already on the disk.

Each tensor goes into the data file as it is added, so memory holds one of them; the model file only
says where they are. Operators of ONNX Runtime's own are in its domain `com.microsoft`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

from qtune.errors import UserError

MODEL, DATA = "model.onnx", "model.onnx.data"
MICROSOFT = "com.microsoft"
# what ONNX Runtime reads since 1.20
OPSET, IR_VERSION = 21, 10
# of the places of tensors in the data file: they are mapped
ALIGNMENT = 64
DTYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float16: TensorProto.FLOAT16,
    torch.uint8: TensorProto.UINT8,
}
Shape = Sequence[str | int]


@dataclass
class Graph:
    """Nodes by the names of what they give; `data` is the open data file."""

    data: IO[bytes]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, TensorProto] = field(default_factory=dict)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)

    def input(self, name: str, dtype: int, shape: Shape) -> str:
        """The name of a new input."""
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, name: str, dtype: int, shape: Shape) -> str:
        """The name of a new output, which a node has to give."""
        self.outputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def op(
        self, kind: str, inputs: Sequence[str], name: str, domain: str = "", **given: Any
    ) -> str:
        """The name of what a new node gives: its own."""
        return self.ops(kind, inputs, [name], domain, **given)[0]

    def ops(
        self, kind: str, inputs: Sequence[str], names: Sequence[str], domain: str = "", **given: Any
    ) -> list[str]:
        """The names of what a new node gives, the first of which is its own."""
        node = helper.make_node(kind, inputs, names, name=names[0], domain=domain, **given)
        self.nodes.append(node)
        return list(names)

    def weight(self, name: str, tensor: Tensor) -> str:
        """The name of a tensor, which is in the data file from now on; one name is written once.

        Raises UserError where the disk takes no more.
        """
        if name in self.weights:
            return name
        proto = TensorProto(name=name, data_type=DTYPES[tensor.dtype], dims=tensor.shape)
        proto.data_location = TensorProto.EXTERNAL
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        place = {"location": DATA, "offset": self._append(flat), "length": flat.numel()}
        for key, value in place.items():
            proto.external_data.add(key=key, value=str(value))
        self.weights[name] = proto
        return name

    def constant(self, name: str, numbers: Sequence[int]) -> str:
        """The name of a list of integers, which is in the model file: shapes follow from it."""
        self.weights[name] = helper.make_tensor(
            name, TensorProto.INT64, [len(numbers)], list(numbers)
        )
        return name

    def save(self, folder: Path) -> None:
        """Write the model file; raises onnx's error for a graph that is none."""
        made = helper.make_graph(
            self.nodes, "decoder", self.inputs, self.outputs, list(self.weights.values())
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(
            made, opset_imports=opsets, ir_version=IR_VERSION, producer_name="qtune"
        )
        onnx.save(model, folder / MODEL)

    def _append(self, flat: Tensor) -> int:
        """Where bytes now are in the data file."""
        try:
            self.data.write(bytes(-self.data.tell() % ALIGNMENT))
            at = self.data.tell()
            self.data.write(flat.numpy().data)
        except OSError as error:
            raise UserError(f"{DATA} cannot be written ({error}); is the disk full?") from error
        return at
