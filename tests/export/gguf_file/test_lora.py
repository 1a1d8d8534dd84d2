from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader

from qtune.errors import UserError
from qtune.export.exporter import Trained
from qtune.export.gguf_file.families import interleaved
from qtune.export.gguf_file.lora import write_lora
from qtune.recipe import Lora, Quant

LORA = Lora(rank=4, alpha=9, rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 3})


def test_products_are_the_whole_updates(train: Callable[..., Trained], tmp_path: Path) -> None:
    """Scaled as llama.cpp does, by alpha over the rank of each."""
    trained = train(quant=Quant(format=None), lora=LORA)
    write_lora(tmp_path / "x.gguf", trained.model, trained.base.config)
    reader = GGUFReader(tmp_path / "x.gguf")
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    alpha = reader.fields["adapter.lora.alpha"].contents()
    assert reader.fields["general.type"].contents() == "adapter"
    block = trained.base.model.layers[1]
    for layer, name in (
        (block.self_attn.q_proj, "attn_q"),
        (block.mlp.up_proj, "ffn_up"),
        (block.mlp.down_proj, "ffn_down"),
    ):
        a, b = (tensors[f"blk.1.{name}.weight.lora_{part}"] for part in "ab")
        expected = layer.get_delta_weight("default").detach()
        expected = interleaved(expected, 4) if name == "attn_q" else expected
        assert torch.allclose(alpha / len(a) * b @ a, expected, atol=1e-6)
    assert len(tensors) == 2 * 2 * 7


def test_more_than_lora_is_refused(train: Callable[..., Trained], tmp_path: Path) -> None:
    trained = train(quant=Quant(format=None), lora=Lora(rank=4, dora=True))
    with pytest.raises(UserError, match=r"lora_magnitude_vector.* merged gguf"):
        write_lora(tmp_path / "x.gguf", trained.model, trained.base.config)
