from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

from qtune.errors import UserError
from qtune.export.gguf_file.base import write_base
from qtune.export.gguf_file.mixes import MIXES
from qtune.export.gguf_file.write import (
    Described,
    Encoded,
    add_encoded,
    add_tensor,
    opened,
    write_model,
)
from qtune.model.gguf import convert


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_what_is_written_is_read_again(family: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """By qtune's own reader: bfloat16 weights of ordinary size come through float16 unchanged."""
    write_base(bases[family], tmp_path / "model.gguf")
    (tmp_path / "again").mkdir()
    convert(tmp_path / "model.gguf", tmp_path / "again", report=lambda line: None)
    before, after = (
        load_file(path / "model.safetensors") for path in (bases[family], tmp_path / "again")
    )
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.allclose(after[name], tensor, rtol=0, atol=2**-24), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "model.gguf"]


def test_types_and_importance(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = bases["llama"]
    config, tokenizer = (kind.from_pretrained(folder) for kind in (AutoConfig, AutoTokenizer))
    described = Described("tiny", config, tokenizer, [0], tied=True)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.v_proj.weight"
    worth = {name: torch.arange(1.0, 129) ** 4}
    found = {}
    for which, importance in (("plain", None), ("weighted", worth)):
        path = tmp_path / f"{which}.gguf"
        write_model(path, weights.items(), described, MIXES["q4_0"], importance)
        found[which] = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    kinds = {name: tensor.tensor_type.name for name, tensor in found["plain"].items()}
    assert kinds["token_embd.weight"] == "Q8_0" and kinds["blk.1.ffn_up.weight"] == "Q4_0"
    assert kinds["output_norm.weight"] == "F32"
    differ = {
        name
        for name, tensor in found["plain"].items()
        if (tensor.data != found["weighted"][name].data).any()
    }
    assert differ == {"blk.0.attn_v.weight"}


def test_weights_beyond_float16_are_refused(tmp_path: Path) -> None:
    with opened(tmp_path / "x.gguf", "llama") as writer:
        add_tensor(writer, "fits", torch.tensor([[65504.0]]), "F16")
        with pytest.raises(UserError, match="large has weights beyond"):
            add_tensor(writer, "large", torch.tensor([[65536.0]]), "F16")


def test_encoded_bytes_are_kept(tmp_path: Path) -> None:
    data = torch.arange(68, dtype=torch.uint8).view(2, 34)
    with opened(tmp_path / "x.gguf", "llama") as writer:
        add_encoded(writer, "x", Encoded(data, "Q8_0"))
    (tensor,) = GGUFReader(tmp_path / "x.gguf").tensors
    assert list(tensor.shape) == [32, 2] and tensor.tensor_type.name == "Q8_0"
    assert torch.equal(torch.tensor(tensor.data), data)
