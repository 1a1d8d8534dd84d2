"""Merged files and exact pairs, loaded by llama.cpp and compared with the trained model."""

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from peft import PeftModel
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from qtune.data.calibration import Text
from qtune.errors import UserError
from qtune.export.exporter import Trained, export, load_exporter
from qtune.export.gguf import EXPORTERS, FILE
from qtune.export.verify import check_logits, reload
from qtune.recipe import Lora, Quant, Recipe

CPU = torch.device("cpu")
# largest change of logits that the bits explain, from the finest to the coarsest
MOST = {
    "f16": 0.01, "q8_0": 0.03, "q6_k": 0.08, "q5_k_m": 0.13, "q4_k_m": 0.25, "q4_0": 0.3,
    "q3_k_m": 0.35, "q2_k": 0.6,
}  # fmt: skip
pytest.importorskip("xllamacpp")


@pytest.fixture(scope="module")
def wide(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose rows are whole blocks of 256."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=320, max_position_embeddings=128,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3 if weight.ndim == 2 else 1)
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(bases["llama"]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def merged(train: Callable[..., Trained], wide: Path) -> Trained:
    """A model trained on a 16-bit base, which merged weights should come close to."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 259, (4, 32), generator=generator).tolist()
    base = train(quant=Quant(format=None), base=wide)
    return replace(base, form="merged", text=lambda: Text(rows, "random"))


def in_float32(trained: Trained) -> PeftModel:
    """The trained model, computed without rounding."""
    return deepcopy(trained.model).float()


@pytest.mark.parametrize("mix", MOST)
def test_llamacpp_answers_as_the_trained_model(
    mix: str, merged: Trained, rows: list[list[int]], tmp_path: Path
) -> None:
    folder = export(f"gguf-{mix}", merged, tmp_path / mix)
    found = reload(f"gguf-{mix}", folder, merged.base_folder, CPU)
    change = check_logits(found, in_float32(merged), rows, max_change=MOST[mix]).change
    assert change > 0
    manifest = json.loads((folder / "qtune.json").read_text())
    assert manifest["form"] == "merged"
    assert manifest["importance"] is (mix not in ("f16", "q8_0"))


def test_int8_base_is_exact(
    train: Callable[..., Trained], rows: list[list[int]], tmp_path: Path
) -> None:
    """Base and adapter are two files; llama.cpp rounds inputs to 8 bits, and nothing else."""
    trained = train("qwen2", quant=Quant(format="int8", group_size=64))
    folder = export("gguf-q8_0", trained, tmp_path / "pair")
    assert (folder / "adapter" / "adapter.gguf").is_file()
    found = reload("gguf-q8_0", folder, trained.base_folder, CPU)
    # the trained model's own bfloat16 makes more of it
    check_logits(found, trained.model, rows, max_change=0.03)


def test_greedy_answers_are_those_of_the_trained_model(
    merged: Trained, rows: list[list[int]], tmp_path: Path
) -> None:
    folder = export("gguf-f16", merged, tmp_path / "f16")
    found = reload("gguf-f16", folder, merged.base_folder, CPU)
    ids = torch.tensor([[0] * 8 + rows[0], rows[1]])
    live = torch.tensor([[0] * 8 + [1] * 9, [1] * 17])
    options = {"attention_mask": live, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = in_float32(merged).generate(ids, **options)
    assert torch.equal(found.generate(ids, **options), expected)


def test_trained_head_is_written_beside_the_embeddings(
    train: Callable[..., Trained], rows: list[list[int]], tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match="tie"):
        trained = train(
            quant=Quant(format=None), lora=Lora(rank=4, alpha=8, modules_to_save=("lm_head",))
        )
    folder = export("gguf-f16", replace(trained, form="merged"), tmp_path / "f16")
    assert "output.weight" in {tensor.name for tensor in GGUFReader(folder / FILE).tensors}
    found = reload("gguf-f16", folder, trained.base_folder, CPU)
    check_logits(found, in_float32(trained), rows, max_change=0.01)


def test_few_bits_are_never_made_of_rounded_weights(
    train: Callable[..., Trained], tmp_path: Path
) -> None:
    trained = replace(train(), form="merged", onto="dequantized")
    folder = export("gguf-q4_0", trained, tmp_path / "q4_0")
    assert json.loads((folder / "qtune.json").read_text())["onto"] == "original"


def test_a_missing_library_is_told_before_training(
    merged: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qtune.export.gguf_file.check.find_spec", lambda name: None)
    (problem,) = load_exporter("gguf-q4_k_m").check(merged.recipe, "merged")
    assert "pip install xllamacpp" in problem


def test_only_an_int8_base_makes_a_pair(merged: Trained) -> None:
    recipe: Recipe = replace(merged.recipe, quant=Quant(format="nf4"))
    assert any("int8" in why for why in EXPORTERS["gguf-q8_0"].check(recipe, "pair"))
    assert not EXPORTERS["gguf-q8_0"].check(recipe, "merged")


def test_trained_scales_have_no_place_in_few_bits(merged: Trained) -> None:
    recipe = replace(merged.recipe, quant=Quant(format="int4"), adapter="scales")
    (problem,) = EXPORTERS["gguf-q4_k_m"].check(recipe, "merged")
    assert "gguf-q8_0" in problem
    with pytest.raises(UserError, match="gguf-q8_0"):
        export("gguf-q4_k_m", replace(merged, recipe=recipe), merged.recipe.run / "x")
