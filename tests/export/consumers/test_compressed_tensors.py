"""Loading by compressed-tensors: what it rounds, and that it may be missing."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from qtune.data.calibration import Text
from qtune.export.consumers import compressed_tensors
from qtune.export.exporter import Trained, export
from qtune.export.folder.load import NotInstalled
from qtune.recipe import Merge, Quant

pytest.importorskip("compressed_tensors")
NAME = "compressed-tensors-w4a16"
CPU = torch.device("cpu")


def test_cache_is_rounded_with_the_scales_of_the_folder(
    train: Callable[..., Trained], rows: list[list[int]], tmp_path: Path
) -> None:
    trained = train(quant=Quant(format="int4"))
    recipe = replace(trained.recipe, merge=Merge(kv_scales=True))
    scaled = replace(trained, recipe=recipe, text=lambda: Text(rows, "rows"))
    folder = export(NAME, scaled, tmp_path / "out")
    model = compressed_tensors.load(folder, CPU)
    assert isinstance(model, PeftModel)
    stored = load_file(folder / "model.safetensors")
    for number, layer in enumerate(model.get_base_model().model.layers):
        for word in ("k_scale", "v_scale"):
            found = getattr(layer.self_attn, word)
            assert torch.equal(found, stored[f"model.layers.{number}.self_attn.{word}"].bfloat16())
    output = model(input_ids=torch.tensor([rows[0]]), use_cache=True)
    values = output.past_key_values.layers[0].values[0].float()
    scale = model.get_base_model().model.layers[0].self_attn.v_scale.float()
    ratios = values / scale
    again = ratios.to(torch.float8_e4m3fn).float()
    # bfloat16 products of an 8-bit float and a scale
    torch.testing.assert_close(ratios, again, rtol=2**-8, atol=0)


def test_plain_folders_have_no_hooks(train: Callable[..., Trained], tmp_path: Path) -> None:
    folder = export(NAME, train(quant=Quant(format="int4")), tmp_path / "out")
    model = compressed_tensors.load(folder, CPU)
    assert not hasattr(model.get_base_model().model.layers[0].self_attn, "k_scale")


def test_missing_library_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed_tensors, "find_spec", lambda _: None)
    assert compressed_tensors.is_missing()
    with pytest.raises(NotInstalled, match="pip install compressed-tensors"):
        compressed_tensors.load(tmp_path, CPU)
