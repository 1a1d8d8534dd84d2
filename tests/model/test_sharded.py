"""What two processes load in slices is, put together, what one process loads whole."""

import json

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForCausalLM
from warm import run_ranks

from qtune.data.calibration import Text
from qtune.model import start
from qtune.model.calibrated import calibrated_folder
from qtune.model.load import add_adapter, load_base
from qtune.model.sharded import load_adapted
from qtune.recipe import Data, Lora, Quant, Recipe, Train

CPU = torch.device("cpu")
# by name: sections of the recipe, and the model: with a tied head, without one, or calibrated
CASES = {
    "nf4": ({}, {}, "tied"),
    "int8, dora, trained head": (
        {"format": "int8", "group_size": 32},
        {"dora": True, "modules_to_save": ["lm_head"]},
        "untied",
    ),
    "16 bits": ({"format": None}, {}, "tied"),
    "calibrated": (
        {"format": "int4", "method": "gptq", "rotate": True, "group_size": 32},
        {"init": "cloq"},
        "calibrated",
    ),
}
RANKS = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from qtune.model.sharded import load_adapted, shard
from qtune.recipe import Data, Lora, Quant, Recipe, Train
from qtune.train import parallel

accelerator = parallel.open_accelerator()
rank, folder = accelerator.process_index, Path(sys.argv[1])
for i, (model, quant, lora) in enumerate(json.loads((folder / "cases.json").read_text())):
    recipe = Recipe(
        model=model, data=Data(train="demo:train"), quant=Quant(**quant), lora=Lora(**lora),
        train=Train(steps=1, parallel="fsdp"), run=Path("unused"), seed=5,
    )
    model = load_adapted(Path(model), recipe, accelerator)
    shard(model, accelerator.device)
    named = dict(model.named_parameters())
    facts = {
        "sharded": all(isinstance(p, DTensor) for p in named.values()),
        "on meta": [n for n, t in [*named.items(), *model.named_buffers()] if t.is_meta],
        "own bytes": sum(p.to_local().nbytes for p in named.values()),
        "tied": model.get_input_embeddings().weight is model.get_output_embeddings().weight,
    }
    (folder / f"{i}-{rank}.json").write_text(json.dumps(facts))
    whole = {name: p.detach().full_tensor() for name, p in named.items()}
    whole |= {name: b for name, b in model.named_buffers()}
    if rank == 0:
        save_file({name: t.contiguous() for name, t in whole.items()}, folder / f"{i}.safetensors")
accelerator.end_training()
"""


def recipe_of(model, quant, lora):
    lora = {"modules_to_save": ()} | lora
    return Recipe(
        model=str(model),
        data=Data(train="demo:train"),
        quant=Quant(**quant),
        lora=Lora(**lora),
        train=Train(steps=1),
        run=model / "unused",
        seed=5,
    )


@pytest.fixture(scope="module")
def models(tiny_model, tmp_path_factory):
    untied = tmp_path_factory.mktemp("untied")
    config = AutoConfig.from_pretrained(tiny_model, tie_word_embeddings=False)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(untied)
    quant, lora, _ = CASES["calibrated"]
    recipe, text = recipe_of(tiny_model, quant, lora), Text([list(range(3, 60))], "rows")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QTUNE_CACHE", str(untied / "cache"))
        calibrated = calibrated_folder(tiny_model, recipe, lambda: text, device=CPU)
    return {"tied": tiny_model, "untied": untied, "calibrated": calibrated}


@pytest.fixture(scope="module")
def loaded(models, tmp_path_factory):
    """The folder in which two processes left what they had loaded."""
    folder = tmp_path_factory.mktemp("loaded")
    cases = [(str(models[kind]), quant, lora) for quant, lora, kind in CASES.values()]
    (folder / "cases.json").write_text(json.dumps(cases))
    (folder / "ranks.py").write_text(RANKS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QTUNE_CACHE", str(folder / "cache"))
        run_ranks(folder / "ranks.py", folder)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_slices_are_those_of_the_whole_model(name, loaded, models):
    from safetensors.torch import load_file

    quant, lora, kind = CASES[name]
    number = list(CASES).index(name)
    torch.manual_seed(5)
    base = load_base(models[kind], Quant(**quant), device=CPU)
    expected = add_adapter(base, recipe_of(models[kind], quant, lora).lora)
    if kind == "calibrated":
        start.put(expected, models[kind] / start.FILE)
    found = load_file(loaded / f"{number}.safetensors")
    wanted = dict(expected.named_parameters()) | dict(expected.named_buffers())
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key
    size = sum(p.nbytes for p in expected.parameters())
    for rank in (0, 1):
        facts = json.loads((loaded / f"{number}-{rank}.json").read_text())
        assert facts.pop("own bytes") == pytest.approx(size / 2, rel=0.01)
        assert facts == {"sharded": True, "on meta": [], "tied": kind != "untied"}


def test_quantized_form_is_made_once(loaded):
    made = sorted(path.name for path in (loaded / "cache/models").iterdir() if path.is_dir())
    assert len(made) == 2, made


def test_single_process_loads_as_ever(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("QTUNE_CACHE", str(tmp_path))
    recipe = recipe_of(tiny_model, {}, {})
    model = load_adapted(tiny_model, recipe, Accelerator())
    torch.manual_seed(5)
    expected = add_adapter(load_base(tiny_model, Quant(), device=CPU), recipe.lora)
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), expected.parameters(), strict=True)
    )
    assert not list(tmp_path.iterdir())
