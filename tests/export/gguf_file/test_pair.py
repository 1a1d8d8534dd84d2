from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize

from qtune.errors import UserError
from qtune.export.exporter import Trained, export
from qtune.export.gguf_file.families import interleaved
from qtune.export.gguf_file.pair import exact, pair_tensors
from qtune.model.merge import quant_layers
from qtune.recipe import Quant

pytest.importorskip("xllamacpp")


@pytest.mark.parametrize("group_size", [32, 64, "row"])
def test_weights_are_those_of_the_base(
    group_size: int, train: Callable[..., Trained], tmp_path: Path
) -> None:
    """Bit for bit, with rows of queries and keys where llama.cpp wants them."""
    trained = train("llama", quant=Quant(format="int8", group_size=group_size))
    folder = export("gguf-q8_0", trained, tmp_path / "pair")
    tensors = {tensor.name: tensor for tensor in GGUFReader(folder / "model.gguf").tensors}
    layers = quant_layers(trained.model)
    for leaf, name, heads in (
        ("self_attn.q_proj", "attn_q", 4),
        ("self_attn.k_proj", "attn_k", 2),
        ("mlp.down_proj", "ffn_down", None),
    ):
        expected = layers[f"model.layers.1.{leaf}.weight"].dequantize(torch.float32)
        found = tensors[f"blk.1.{name}.weight"]
        assert found.tensor_type.name == "Q8_0"
        expected = interleaved(expected, heads) if heads else expected
        assert torch.equal(torch.tensor(dequantize(found.data, found.tensor_type)), expected)


def test_what_is_not_quantized_is_exact() -> None:
    matrix = torch.tensor([[1.0, 2**-20, 3.5]], dtype=torch.bfloat16)
    assert exact(matrix).kind == "F16"
    assert exact(matrix * 2**-60).kind == "BF16"
    assert exact(torch.tensor([[1 + 2**-20]])).kind == "F32"


def test_groups_that_are_no_whole_blocks_are_refused(train: Callable[..., Trained]) -> None:
    trained = train("llama", quant=Quant(format="int8", group_size=16))
    with pytest.raises(UserError, match=r"layers.0.*groups of 16 .*group_size: 64"):
        list(pair_tensors(trained))
