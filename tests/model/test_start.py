"""Starts of adapters: into a file, into a model, and out of what an adapter does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from qtune.errors import UserError
from qtune.model.load import add_adapter, register
from qtune.model.merge import merged_tensors
from qtune.model.start import FILE, PREFIX, Start, difference, put, read, write
from qtune.recipe import Lora

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 40,
}


@pytest.fixture(autouse=True)
def registered() -> None:
    register()


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def random(*shape: int, seed: int) -> Tensor:
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def starts(rank: int = 4) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        Q: (random(rank, 32, seed=1), random(32, rank, seed=2)),
        DOWN: (random(rank, 48, seed=3), random(32, rank, seed=4)),
    }


def adapted(tmp_path: Path, settings: Lora, begun: Start) -> PeftModel:
    """A model whose adapter is at its start."""
    write(tmp_path / FILE, begun)
    torch.manual_seed(5)
    model = add_adapter(base(), settings)
    put(model, tmp_path / FILE)
    return model


def trained(model: PeftModel) -> PeftModel:
    """The model with another adapter than it had."""
    torch.manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def delta(model: PeftModel, name: str) -> Tensor:
    layer: Any = model.get_base_model().get_submodule(name)
    found: Tensor = layer.get_delta_weight("default").detach()
    return found


def test_file_has_the_names_of_peft(tmp_path: Path) -> None:
    write(tmp_path / FILE, starts())
    model = add_adapter(base(), Lora(rank=4))
    assert set(load_file(tmp_path / FILE)) < set(get_peft_model_state_dict(model))
    back = read(tmp_path / FILE)
    assert list(back) == sorted(starts())
    for name, pair in starts().items():
        assert all(torch.equal(x, y) for x, y in zip(back[name], pair, strict=True))


def test_no_file_is_a_start_at_zero(tmp_path: Path) -> None:
    assert read(tmp_path / FILE) == {}


@pytest.mark.parametrize(
    "settings",
    [
        Lora(rank=4, alpha=8),
        Lora(rank=4, alpha=8, rslora=True),
        Lora(rank=4, alpha_pattern={"down_proj": 3.0}),
    ],
    ids=["lora", "rslora", "pattern"],
)
def test_scaling_is_divided_out(settings: Lora, tmp_path: Path) -> None:
    model = adapted(tmp_path, settings, starts())
    for name, (a, b) in starts().items():
        torch.testing.assert_close(delta(model, name), b @ a)
    assert not delta(model, Q.replace("q_proj", "k_proj")).any()


def test_ranks_that_the_start_does_not_fill_can_still_learn(tmp_path: Path) -> None:
    model = adapted(tmp_path, Lora(rank=8, rank_pattern={"q_proj": 6}), starts(4))
    for name, rank in ((Q, 6), (DOWN, 8)):
        a, b = starts(4)[name]
        torch.testing.assert_close(delta(model, name), b @ a)
        layer: Any = model.get_base_model().get_submodule(name)
        assert layer.lora_A["default"].weight.shape[0] == rank
        # B's gradient there is not zero
        assert layer.lora_A["default"].weight[4:].any(dim=1).all()


def test_another_rank_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"q_proj has rank 4 and not 2; set lora\.rank back"):
        adapted(tmp_path, Lora(rank=4, rank_pattern={"q_proj": 2}), starts())


def test_a_start_for_a_layer_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="down_proj, which has no adapter here"):
        adapted(tmp_path, Lora(rank=4, target_modules=("q_proj",)), starts())


def test_dora_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dora"):
        adapted(tmp_path, Lora(rank=4, dora=True), starts())


def written(model: PeftModel, begun: Start, folder: Path) -> PeftModel:
    """The difference as PEFT loads it onto the original base."""
    state, changes = difference(model, get_peft_model_state_dict(model), begun)
    config = LoraConfig(**{**model.active_peft_config.to_dict(), **changes, "peft_type": "LORA"})
    fresh: PeftModel = get_peft_model(base(), config)
    found = {key.replace(".weight", ".default.weight"): t for key, t in state.items()}
    missing, unexpected = fresh.load_state_dict(found, strict=False)
    assert not unexpected
    assert not [name for name in missing if "lora_" in name]
    return fresh.eval()


@pytest.mark.parametrize(
    "settings",
    [
        Lora(rank=4, alpha=8),
        Lora(rank=6, alpha=9, rslora=True),
        Lora(rank=5, rank_pattern={"q_proj": 7, "up_proj": 3}, alpha_pattern={"q_proj": 5.0}),
    ],
    ids=["lora", "rslora", "patterns"],
)
def test_difference_is_what_training_did(settings: Lora, tmp_path: Path) -> None:
    model = trained(adapted(tmp_path, settings, starts()))
    fresh = written(model, starts(), tmp_path)
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "get_delta_weight"):
            expected = delta(model, name)
            if name in starts():
                a, b = starts()[name]
                expected = expected - b @ a
            torch.testing.assert_close(delta(fresh, name), expected)


def test_an_untrained_adapter_is_no_difference(tmp_path: Path) -> None:
    model = adapted(tmp_path, Lora(rank=4, alpha=8), starts()).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        found = written(model, starts(), tmp_path)(ids).logits
        torch.testing.assert_close(found, base().eval()(ids).logits)
        assert not torch.allclose(model(ids).logits, found, atol=1e-3)


@pytest.mark.parametrize("onto", ["original", "dequantized"])
def test_merge_onto_the_original_leaves_the_start_out(onto: Any, tmp_path: Path) -> None:
    base().save_pretrained(tmp_path / "base")
    model = trained(adapted(tmp_path, Lora(rank=4, alpha=8), starts()))
    found = dict(merged_tensors(tmp_path / "base", model, onto, start=starts()))
    a, b = starts()[Q]
    expected = base().get_submodule(Q).get_parameter("weight") + delta(model, Q)
    if onto == "original":
        expected = expected - b @ a
    torch.testing.assert_close(found[f"{Q}.weight"], expected.detach())
    other = Q.replace("q_proj", "v_proj")
    plain = base().get_submodule(other).get_parameter("weight") + delta(model, other)
    torch.testing.assert_close(found[f"{other}.weight"], plain.detach())


def test_tensors_that_are_no_adapter_pass_through() -> None:
    settings = Lora(rank=4, modules_to_save=("lm_head",), target_modules=("q_proj",))
    model = trained(add_adapter(base(), settings))
    state = get_peft_model_state_dict(model)
    made, changes = difference(model, state, {})
    kept = [key for key in state if "lora_" not in key]
    assert kept and all(made[key] is state[key] for key in kept)
    assert changes["r"] == 8 and changes["lora_alpha"] == 64
    assert made[f"{PREFIX}{Q}.lora_A.weight"].shape == (8, 32)
    assert not made[f"{PREFIX}{Q}.lora_A.weight"][4:].any()
