from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MixtralConfig,
    PhiConfig,
    Qwen3Config,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from qtune import recipe_yaml, run
from qtune.data.collate import Batch, collate
from qtune.data.sample import Sample
from qtune.machine import Peak
from qtune.model.blocks import blocks
from qtune.model.load import add_adapter, load_base
from qtune.model.lora import QuantLoraLinear
from qtune.recipe import Lora, Quant, Train
from qtune.run_folder import RunFolder
from qtune.setup import open_setup
from qtune.train import loop, recompute, state
from qtune.train.log import read_metrics
from qtune.train.objective import load_objective
from qtune.train.recompute import POLICIES, ChangedInPlaceError

CPU = torch.device("cpu")
QUANT, LORA = Quant(), Lora(rank=4, alpha=8)
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
SFT = load_objective(Train(steps=1))
PRODUCTS = {"aten::mm", "aten::addmm", "qtune::lora_linear", "qtune::linear"}
KEPT_ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"


class Operations(TorchDispatchMode):
    """Counts what runs within it."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func.name()] += 1
        return func(*args, **(kwargs or {}))


def loaded(folder, quant=QUANT, lora=LORA) -> PeftModel:
    """The model with an adapter that does something: as it starts, B is zero."""
    base = load_base(folder, quant, device=CPU)
    torch.manual_seed(0)
    model = add_adapter(base, lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    return model.train()


def two_samples() -> Batch:
    """Samples of 20 and 13 tokens."""
    ids = torch.randint(0, 512, (33,), generator=torch.Generator().manual_seed(0)).tolist()
    parts = ids[:20], ids[20:]
    return collate([Sample("t:1", part, [0.0] + [1.0] * (len(part) - 1)) for part in parts])


def step(model, batch, policy) -> list[torch.Tensor]:
    """The loss and all gradients of one step, and the random number drawn after it."""
    recompute.use(model, policy)
    torch.manual_seed(1)
    loss, _ = SFT.loss(model, batch, None)
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    found = [loss.detach(), *(p.grad for p in trained if p.grad is not None), torch.rand(1)]
    model.zero_grad()
    return found


def assert_same_steps(model, batch):
    none, cheap, everything = (step(model, batch, policy) for policy in POLICIES)
    assert len(none) == len(cheap) == len(everything) >= 10
    assert all(gradient.any() for gradient in none)
    for other in (cheap, everything):
        assert all(torch.equal(a, b) for a, b in zip(none, other, strict=True))


@pytest.mark.parametrize(
    ("quant", "lora"),
    [
        ({}, {}),
        ({}, {"dropout": 0.3}),
        ({}, {"dora": True, "dropout": 0.3}),
        ({"format": "int8"}, {}),
        ({"format": None}, {"dropout": 0.3}),
    ],
)
def test_policies_give_the_same_bits(tiny_model, quant, lora):
    model = loaded(tiny_model, Quant(**quant), Lora(rank=4, alpha=8, **lora))
    assert_same_steps(model, two_samples())


@pytest.mark.parametrize("zeros", [False, True])
def test_policies_give_the_same_bits_where_scales_are_trained(tiny_model, zeros):
    model = loaded(tiny_model, Quant(format="int4", group_size=32))
    for module in list(model.modules()):
        if isinstance(module, QuantLoraLinear):
            module.train_scales(zeros=zeros)
    assert_same_steps(model, two_samples())


ARCHITECTURES = {
    # the CPU's own attention takes heads of 32 and more
    "wide heads": LlamaConfig(**GROUPED, head_dim=32),
    "attention dropout": LlamaConfig(**GROUPED, attention_dropout=0.3),
    "eager attention": Gemma2Config(**GROUPED, head_dim=16),
    "norms of queries": Qwen3Config(**GROUPED, head_dim=16),
    "biases": PhiConfig(**SIZES),
    "experts": MixtralConfig(**GROUPED, num_local_experts=4),
}


def saved(config, folder: Path) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = model.generation_config.bos_token_id = None
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:.*ParamWrapper.*:UserWarning")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_policies_give_the_same_bits_in_every_architecture(tmp_path, name):
    folder = saved(ARCHITECTURES[name], tmp_path)
    dropout = 0.0 if name == "experts" else 0.3
    targets = ("q_proj", "v_proj")
    model = loaded(folder, lora=Lora(rank=4, alpha=8, dropout=dropout, target_modules=targets))
    assert_same_steps(model, two_samples())


def operations_of_backward(model, policy) -> Counter:
    recompute.use(model, policy)
    loss, _ = SFT.loss(model, two_samples(), None)
    with Operations() as ran:
        loss.backward()
    model.zero_grad()
    return ran.count


@pytest.mark.parametrize("quant", [Quant(), Quant(format=None)])
def test_cheap_runs_no_product_and_no_attention_again(tiny_model, quant):
    model = loaded(tiny_model, quant)
    none, cheap, everything = (operations_of_backward(model, policy) for policy in POLICIES)
    # the second half of a PEFT adapter on a dense layer is all that is multiplied again
    narrow = 0 if quant.format else 2 * 7
    products = [sum(ran[name] for name in PRODUCTS) for ran in (none, cheap, everything)]
    assert products[0] <= products[1] <= products[0] + narrow < products[2]
    assert cheap[KEPT_ATTENTION] == 0 < everything[KEPT_ATTENTION]
    # norms and activations are
    assert none.total() < cheap.total() < everything.total()


def decided(op, *args, **kwargs):
    return recompute._decide(None, op, *args, **kwargs) is CheckpointPolicy.MUST_SAVE


def test_deep_products_are_kept_and_narrow_ones_are_not():
    x, up, a = torch.ones(5, 64), torch.ones(64, 256), torch.ones(64, 4)
    mm, addmm = torch.ops.aten.mm.default, torch.ops.aten.addmm.default
    assert decided(mm, x, up) and decided(mm, x, a)
    assert decided(addmm, torch.ones(256), x, up)
    assert not decided(mm, x @ a, a.T) and not decided(addmm, torch.ones(64), x @ a, a.T)
    assert not decided(torch.ops.aten.mul.Tensor, x, x)
    assert not decided(torch.ops.aten.addmm_.default, x, x @ a, a.T)


def test_attention_that_drops_is_made_again():
    """Kept, it would draw no random numbers, and what drops after it would draw others."""
    q = torch.ones(1, 2, 5, 16)
    flash = torch.ops.aten._scaled_dot_product_flash_attention.default
    assert decided(flash, q, q, q) and decided(flash, q, q, q, 0.0, True, scale=1.0)
    assert not decided(flash, q, q, q, 0.1) and not decided(flash, q, q, q, dropout_p=0.1)


def test_other_policies_leave_no_trace(tiny_model):
    model = loaded(tiny_model)
    before = operations_of_backward(model, "none")
    operations_of_backward(model, "all")
    assert operations_of_backward(model, "none") == before


class Block(GradientCheckpointingLayer):
    def __init__(self, *inner):
        super().__init__()
        self.inner = torch.nn.ModuleList(inner)


def test_blocks_are_the_outermost_ones():
    outer = [Block(Block(), torch.nn.Linear(1, 1)), Block()]
    assert list(blocks(torch.nn.Sequential(torch.nn.Sequential(*outer)))) == outer
    assert list(blocks(torch.nn.Linear(1, 1))) == []


class AddsInPlace(GradientCheckpointingLayer):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(8, 8))

    def forward(self, x):
        return (x @ self.weight).add_(1).sin()


def test_what_is_changed_in_place_is_found():
    model = torch.nn.Sequential(AddsInPlace())
    for policy in POLICIES:
        recompute.use(model, policy)
        y = model(torch.ones(3, 8)).sum()
        if policy == "cheap":
            with pytest.raises(ChangedInPlaceError), recompute.changes_reported():
                y.backward()
        else:
            with recompute.changes_reported():
                y.backward()


def test_other_errors_stay_what_they_are():
    something = pytest.raises(RuntimeError, match="something else")
    with something as found, recompute.changes_reported():
        raise RuntimeError("something else")
    assert not isinstance(found.value, ChangedInPlaceError)


class StopsAfter(Peak):
    """Interrupts a training behind its n-th step."""

    def __init__(self, steps):
        super().__init__(CPU)
        self.left = steps

    def bytes(self):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return super().bytes()


def train(recipe, policy, peak=None):
    """Train the recipe from its last checkpoint under a policy; the adapter."""
    setup = open_setup(recipe, Accelerator())
    recipe.run.mkdir(exist_ok=True, parents=True)
    model = loaded(setup.base, recipe.quant, recipe.lora)
    recompute.use(model, policy)
    job = loop.Job(
        recipe=recipe,
        model=model,
        objective=SFT,
        feed=setup.data.feed,
        held_out=setup.data.held_out,
        num_steps=recipe.train.steps,
        folder=recipe.run,
        start=state.resumed(recipe.run / "checkpoints", state.fresh(setup.data.feed, 1)),
        peak=peak or Peak(CPU),
    )
    loop.train(job, Accelerator())
    return [p.detach() for p in model.parameters() if p.requires_grad]


def losses(recipe):
    return [(m["step"], m["loss"]) for m in read_metrics(recipe.run) if "loss" in m]


@pytest.mark.parametrize(
    ("first", "then"), [("none", "cheap"), ("cheap", "cheap"), ("cheap", "all"), ("all", "none")]
)
def test_a_run_resumed_with_any_policy_is_the_same_run(tiny_recipe, tmp_path, first, then):
    recipe = tiny_recipe(lora={"dropout": 0.3}, train={"steps": 4})
    whole = train(recipe, "none")
    again = replace(recipe, run=tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        train(again, first, StopsAfter(3))
    resumed = train(again, then)
    assert losses(again) == losses(recipe)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


@pytest.mark.parametrize("then", [0.95, 1.0])
def test_a_run_goes_on_with_the_policy_it_began_with(tiny_recipe, monkeypatch, then):
    recipe = tiny_recipe(train={"save_every": 1}, evaluate={"answer_rows": 0}, export=())
    setup = open_setup(recipe, Accelerator())
    sizes = run.make_plan(recipe, setup.base, setup.data.feed, CPU).recompute.total_bytes
    used, use = [], recompute.use
    monkeypatch.setattr(recompute, "use", lambda model, p: (used.append(p), use(model, p)))
    # cheap fits with room to spare, none does not
    monkeypatch.setattr(run, "available_bytes", lambda device: int(sizes["cheap"] / 0.89))
    monkeypatch.setattr(run, "Peak", lambda device: StopsAfter(3))
    with pytest.raises(KeyboardInterrupt):
        run.train(recipe)
    folder = RunFolder(recipe.run, recipe_yaml.load(recipe.run / "recipe.yaml"))
    assert folder.read("plan.json")["recompute"]["policy"] == used[-1] == "cheap"
    monkeypatch.setattr(run, "Peak", Peak)
    monkeypatch.setattr(run, "available_bytes", lambda device: int(then * sizes["cheap"]))
    run.train(recipe, resume=True)
    # with another one only where it would not go on at all
    expected = "cheap" if then >= 1 else "all"
    assert folder.read("plan.json")["recompute"]["policy"] == used[-1] == expected
    assert folder.read("plan.json")["recompute"]["total_bytes"] == sizes
    assert [s for s, _ in losses(recipe)] == [1, 2, 3, 4]


def test_every_policy_trains_on_a_packed_batch(tiny_recipe):
    recipe = tiny_recipe()
    batch = collate(open_setup(recipe, Accelerator()).data.feed.samples[:3])
    assert_same_steps(loaded(Path(recipe.model)), batch)
