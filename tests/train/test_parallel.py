"""Two processes over gloo against one: `ranks.py`, beside this file, is what they run."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from warm import run_ranks

from qtune.errors import UserError
from qtune.model.load import add_adapter, load_base
from qtune.recipe import Lora, Quant
from qtune.train import parallel

SCRIPT = Path(__file__).with_name("ranks.py")
spec = importlib.util.spec_from_file_location("ranks", SCRIPT)
ranks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ranks)

STEPS = [0, 2]
SFT, DPO, HEAD = {}, {"objective": "dpo"}, {"trained": ["lm_head"]}
# what two processes run, by name, and the same in one process
CASES = {
    "ddp": SFT | {"how": "ddp"},
    "fsdp": SFT | {"how": "fsdp", "sliced": True},
    "fsdp cheap": SFT | {"how": "fsdp", "recompute": "cheap"},
    "fsdp all": SFT | {"how": "fsdp", "recompute": "all"},
    "ddp dpo": DPO | {"how": "ddp", "recompute": "all"},
    "fsdp dpo": DPO | {"how": "fsdp", "recompute": "all"},
    "fsdp head": HEAD | {"how": "fsdp"},
}
# relative; gradients are sums in another order, those of the head in bf16
ROUNDING = dict.fromkeys(CASES, 2e-5) | {"fsdp head": 5e-3}


def in_two_processes(folder, cases):
    """What the first of two processes saw of each case."""
    path = folder / "cases.json"
    path.write_text(json.dumps(cases))
    run_ranks(SCRIPT, path)
    return json.loads(path.with_suffix(".results").read_text())


@pytest.fixture(scope="module")
def models(tiny_model, tmp_path_factory):
    """The model for each case: a head that is trained must not be tied to the embeddings."""
    untied = tmp_path_factory.mktemp("untied")
    config = AutoConfig.from_pretrained(tiny_model, tie_word_embeddings=False)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(untied)
    return {name: str(untied if "trained" in case else tiny_model) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the cases put what they save, under their names."""
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def seen(models, folder):
    patch = pytest.MonkeyPatch()
    patch.setenv("QTUNE_CACHE", str(folder / "cache"))
    cases = [
        case | {"model": models[name], "steps": STEPS, "save": str(folder / name)}
        for name, case in CASES.items()
    ]
    found = in_two_processes(folder, cases)
    patch.undo()
    return dict(zip(CASES, found, strict=True))


def alone(**case):
    return ranks.run({"how": "ddp", **case}, Accelerator())


def figures(found):
    return [*found["losses"], *found["norms"], found["held_out"], found["size"]]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_like_one(name, seen, models):
    case = {k: v for k, v in CASES[name].items() if k in ("objective", "trained")}
    one = alone(model=models[name], steps=STEPS, **case)
    assert figures(seen[name]) == pytest.approx(figures(one), rel=ROUNDING[name])
    assert one["losses"][0] != one["losses"][1]


def test_ways_of_sharding_and_recomputing_give_the_same_bits(seen):
    others = ("fsdp cheap", "fsdp all")
    assert all(figures(seen[name]) == figures(seen["fsdp"]) for name in others)


def test_sharded_process_holds_half(seen):
    assert seen["ddp"]["own_bytes"] == seen["ddp"]["bytes"]
    for name in ("fsdp", "fsdp head"):
        assert seen[name]["own_bytes"] == pytest.approx(seen[name]["bytes"] / 2, rel=0.01)


def test_other_number_of_processes_goes_on_from_whole_tensors(seen, models, folder):
    model = {"model": models["fsdp"]}
    middle = {"steps": [2, 4], "resume": str(folder / "fsdp"), "save": str(folder / "middle")}
    losses = seen["fsdp"]["losses"] + alone(**model | middle)["losses"]
    end = model | {"steps": [4, 5], "resume": str(folder / "middle")}
    whole = alone(**model | {"steps": [0, 5]})
    for last in in_two_processes(folder, [end | {"how": "ddp"}, end | {"how": "fsdp"}]):
        found = [*losses, *last["losses"], last["size"]]
        assert found == pytest.approx([*whole["losses"], whole["size"]], rel=2e-5)


def test_one_process_gets_its_model_back(tiny_model):
    model = add_adapter(load_base(tiny_model, Quant(), device=torch.device("cpu")), Lora(rank=2))
    accelerator = Accelerator()
    for how in ("ddp", "fsdp"):
        net = parallel.distribute(model, accelerator, how)
        assert net is model
        with parallel.without_sync(net, accelerator):
            pass
    parallel.settle(net)


@pytest.mark.parametrize("limit", [0.1, 1000.0])
def test_norm_is_that_of_all_gradients_and_they_are_scaled_to_the_limit(limit):
    parameters = [nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(5))]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    flat = torch.cat([p.grad.flatten() for p in parameters]).double()
    norm = parallel.clip_grad_norm(iter([*parameters, nn.Parameter(torch.zeros(1))]), limit)
    assert norm == pytest.approx(float(flat.norm()), rel=1e-6)
    clipped = torch.cat([p.grad.flatten() for p in parameters]).double()
    assert torch.allclose(clipped, flat * min(1, limit / norm), rtol=1e-4)


def test_plain_tensors_are_whole_and_take_what_is_put():
    tensor = nn.Parameter(torch.zeros(3))
    parallel.put(tensor, torch.arange(3.0))
    assert torch.equal(parallel.whole(tensor), torch.arange(3.0))
    assert not parallel.whole(tensor).requires_grad


@pytest.mark.parametrize("variable", parallel.REFUSED)
def test_accelerates_own_ways_of_sharding_are_refused(variable, monkeypatch):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(UserError, match=r"train\.parallel: fsdp"):
        parallel.open_accelerator()


def test_processes_that_accelerate_left_to_mpi_are_missed(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(UserError, match=r"--nproc N.*--multi_gpu"):
        parallel.open_accelerator()


def test_processes_without_a_gpu_find_each_other(monkeypatch):
    # accelerate alone would take each for a run of its own
    made = {}
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(parallel, "Accelerator", lambda **options: made.update(options))
    parallel.open_accelerator()
    assert made["cpu"] is True
    monkeypatch.delenv("LOCAL_RANK")
    made.clear()
    parallel.open_accelerator()
    assert "cpu" not in made
