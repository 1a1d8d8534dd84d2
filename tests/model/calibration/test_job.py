"""The whole calibration: what the folder holds, what interruptions cost, the memory it takes."""

import json
import weakref

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from qtune.data.calibration import Text
from qtune.model import start
from qtune.model.calibration import block
from qtune.model.calibration import job as module
from qtune.model.calibration.job import Job
from qtune.model.load import load_base
from qtune.recipe import Calibration, Data, Lora, Quant, Recipe, Train
from tests.model.mixtures import save_mixture

CPU = torch.device("cpu")


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(module, "say", lines.append)
    return lines


@pytest.fixture
def run(tmp_path, rows):
    """Runs a job into a folder of the given name, which comes back, with its recipe's quant."""

    def calibrate(source, name="made", lora=None, dtype=torch.bfloat16, text=None, **quant):
        settings = {"format": "nf4", "group_size": 16, "method": "gptq"} | quant
        recipe = Recipe(
            model=str(source),
            data=Data(train="demo:train"),
            quant=Quant(**settings),
            lora=Lora(**{"rank": 2, "alpha": 4} | (lora or {})),
            train=Train(steps=1),
            run=tmp_path / "run",
        )
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        kept = tmp_path / f"{name}-kept"
        Job(source, recipe, text or Text(rows, "rows"), kept, CPU, dtype).run(folder)
        assert not kept.exists()
        return folder, recipe.quant

    return calibrate


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_folder_loads_and_is_close_to_the_model(make_model, read, rows, run, family, tied):
    source = make_model(family, tie_word_embeddings=tied)
    folder, quant = run(source, dtype=torch.float32)
    model = load_base(folder, quant, device=CPU, dtype=torch.float32)
    names = load_file(folder / "model.safetensors").keys()
    assert ("lm_head.weight" in names) != tied
    assert any(name.endswith("q_proj.bias") for name in names) == (family == "qwen2")
    ids = torch.tensor(rows[:1])
    with torch.no_grad():
        truth, found = read(source)(ids).logits, model(ids).logits
        nearest = load_base(source, Quant(group_size=16), device=CPU, dtype=torch.float32)(
            ids
        ).logits
    assert (found - truth).norm() < 0.8 * (nearest - truth).norm()


def test_figures_and_start(make_model, run, rows):
    folder, _ = run(make_model(), lora={"init": "cloq", "rank_pattern": {"down_proj": 3}})
    figures = json.loads((folder / "calibration.json").read_text())
    assert figures["tokens"] == 59 and figures["sha256"] == Text(rows, "rows").sha256
    assert (figures["text"], figures["method"], figures["init"]) == ("rows", "gptq", "cloq")
    assert len(figures["layers"]) == 14 and figures["formats"] == {"nf4": 14}
    assert all(0 < layer["adapted_error"] < layer["error"] < 0.05 for layer in figures["layers"])
    starts = start.read(folder / start.FILE)
    assert {name: len(a) for name, (a, _) in starts.items()} == {
        layer["name"]: 3 if "down_proj" in layer["name"] else 2 for layer in figures["layers"]
    }


def test_no_start_at_zero_and_none_for_layers_without_an_adapter(make_model, run):
    assert not (run(make_model(), "zero")[0] / start.FILE).exists()
    folder, _ = run(make_model(), lora={"init": "cloq", "target_modules": ("q_proj",)})
    assert all("q_proj" in name for name in start.read(folder / start.FILE))


def test_interrupted_job_goes_on_and_gives_the_same_bytes(make_model, run, monkeypatch):
    source = make_model(num_hidden_layers=3)
    options = {"lora": {"init": "cloq"}}
    expected, _ = run(source, "whole", **options)
    plain, calls = module.calibrate_block, []

    def interrupted(dense, name, *args):
        calls.append(name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(dense, name, *args)

    monkeypatch.setattr(module, "calibrate_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(source, "made", **options)
    found, _ = run(source, "made", **options)
    assert calls == [f"model.layers.{i}" for i in (0, 1, 2, 2)]
    for path in expected.iterdir():
        if path.name != "calibration.json":
            assert (found / path.name).read_bytes() == path.read_bytes(), path.name
    errors = [
        [
            layer["error"]
            for layer in json.loads((folder / "calibration.json").read_text())["layers"]
        ]
        for folder in (expected, found)
    ]
    assert errors[0] == errors[1]


def test_too_little_text_is_told_with_what_is_needed(make_model, run, said):
    run(make_model())
    assert "59 tokens tell little about inputs 96 wide; 768 are better" in said[0]


def test_enough_text_is_not_mentioned(make_model, run, said):
    long = torch.randint(3, 97, (16, 48), generator=torch.Generator().manual_seed(0)).tolist()
    run(make_model(), text=Text(long, "long"))
    assert not said


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_experts_take_the_nearest_codes_which_is_said(tmp_path, run, said, family):
    source = save_mixture(tmp_path / "model", family)
    folder, quant = run(source, group_size=32)
    assert any("experts take the nearest codes" in line for line in said)
    found = load_base(folder, quant, device=CPU)
    nearest = load_base(source, Quant(group_size=32), device=CPU)
    state, expected = found.state_dict(), nearest.state_dict()
    assert state.keys() == expected.keys()
    experts = [name for name in state if "expert_" in name]
    assert experts and all(torch.equal(state[name], expected[name]) for name in experts)
    others = [n for n in state if n.endswith("proj.weight") and "expert_" not in n]
    assert any(not torch.equal(state[name], expected[name]) for name in others)


def test_layers_outside_of_blocks_take_the_nearest_codes_which_is_said(
    make_model, run, said, monkeypatch
):
    source = make_model()
    plain = module.trace

    def first_block_only(model, rows, ready):
        found = plain(model, rows, ready)
        return module.Trace(found.names[:1], found.calls, found.hidden)

    monkeypatch.setattr(module, "trace", first_block_only)
    folder, quant = run(source)
    assert any("outside of the blocks" in line and "layers.1.mlp" in line for line in said)
    found = load_base(folder, quant, device=CPU).state_dict()
    nearest = load_base(source, Quant(group_size=16), device=CPU).state_dict()
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(found[name], nearest[name])


@pytest.mark.parametrize("sequential", [True, False])
def test_one_dense_block_at_a_time(make_model, run, monkeypatch, sequential):
    alive, most = weakref.WeakSet(), [0]
    plain = block._place

    def copied(layer, weight, device):
        place = plain(layer, weight, device)
        # as on another device: here the layer's weight would stay in its file
        place.dense.weight = nn.Parameter(place.dense.weight.clone(), requires_grad=False)
        alive.add(place.dense.weight)
        most[0] = max(most[0], sum(weight.numel() for weight in alive))
        return place

    monkeypatch.setattr(block, "_place", copied)
    source = make_model(num_hidden_layers=4)
    run(source, calibration=Calibration(sequential=sequential))
    weights = load_file(source / "model.safetensors").items()
    in_a_block = sum(t.numel() for n, t in weights if "layers.0." in n and "proj" in n)
    assert most[0] == in_a_block and not alive
