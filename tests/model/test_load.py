"""Loading, adapters and packed rows over families of architectures, and mistakes in recipes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qtune.data.collate import Batch, collate
from qtune.data.sample import Sample
from qtune.errors import UserError
from qtune.model import attention
from qtune.model.forward import forward_logits
from qtune.model.load import add_adapter, load_base, load_tokenizer, register
from qtune.model.lora import QuantLoraLinear
from qtune.quant.linear import QuantLinear
from qtune.recipe import Lora, Quant
from qtune_kernels.cross_entropy import summed_cross_entropy

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# windows are shorter than the samples
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 4},
    "gemma2": {"head_dim": 16, "sliding_window": 4, "attn_logit_softcapping": 1.0},
    "gemma3_text": {"head_dim": 16, "sliding_window": 4},
    "phi": {},
    "gpt_neox": {},
    "olmo2": {},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1},
    "bloom": {"n_head": 4},
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
}


@pytest.fixture(autouse=True)
def registered() -> None:
    register()


def save(folder: Path, family: str = "llama", **settings: Any) -> Path:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**{**SMALL, **settings})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # large weights, so that what is seen by mistake shows
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def load(folder: Path, **settings: Any) -> PreTrainedModel:
    return load_base(folder, Quant(**settings), device=CPU, dtype=torch.float32)


def batch(lengths: tuple[int, ...] = (9, 5, 12, 2)) -> Batch:
    generator = torch.Generator().manual_seed(1)
    made = []
    for number, length in enumerate(lengths):
        ids = torch.randint(3, 97, (length,), generator=generator).tolist()
        made.append(Sample(f"t:{number}", ids, [0.0] + [1.0] * (length - 1)))
    return collate(made)


def alone(model: nn.Module, packed: Batch) -> Tensor:
    """Logits [N, V] of the samples, each run by itself through transformers' own attention."""
    rows = packed.input_ids[0].split(packed.lengths)
    return torch.cat([model(input_ids=row[None], use_cache=False).logits[0, :-1] for row in rows])


@pytest.mark.parametrize("family", FAMILIES)
def test_family_loads_packs_and_trains(family: str, tmp_path: Path) -> None:
    folder = save(tmp_path, family, **FAMILIES[family])
    model, packed = load(folder), batch()
    linears = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert sum(isinstance(layer, QuantLinear) for layer in linears) >= 4
    assert type(model.get_output_embeddings()) is nn.Linear
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        found = forward_logits(model, packed)
        usual = model.config._attn_implementation
        model.set_attn_implementation("eager")
        torch.testing.assert_close(found, alone(model, packed), atol=2e-4, rtol=1e-3)
        model.config._attn_implementation = usual
        model.set_attn_implementation(usual)
    tuned = add_adapter(model, Lora(rank=2, alpha=4))
    assert torch.equal(forward_logits(tuned, packed), found)
    losses = [train_step(tuned, packed) for _ in range(3)]
    assert losses[-1] < losses[0]


def train_step(model: PeftModel, packed: Batch) -> float:
    """One step of gradient descent on the adapter; the loss before it."""
    loss = summed_cross_entropy(forward_logits(model, packed), packed.targets) / len(packed.targets)
    loss.backward()
    for parameter in model.parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            parameter.data -= 0.02 * parameter.grad
            parameter.grad = None
        else:
            assert parameter.grad is None
    return float(loss.detach())


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_loss_is_that_of_the_dense_model_with_the_same_weights(tmp_path: Path, name: str) -> None:
    folder, packed = save(tmp_path), batch()
    model = load(folder, format=name)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for layer_name, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            dense.get_submodule(layer_name).weight.data = layer.dequantize(torch.float32).double()
    expected = nn.functional.cross_entropy(alone(dense, packed), packed.targets, reduction="sum")
    found = summed_cross_entropy(forward_logits(model, packed), packed.targets)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    folder, packed = save(tmp_path), batch()

    def gradients(checkpointing: bool) -> list[Tensor]:
        torch.manual_seed(0)
        tuned = add_adapter(load(folder), Lora(rank=2, alpha=4))
        if checkpointing:
            checkpoint_blocks(tuned)
        tuned.train()
        summed_cross_entropy(forward_logits(tuned, packed), packed.targets).backward()
        return [p.grad for p in tuned.parameters() if p.grad is not None]

    plain, recomputed = gradients(False), gradients(True)
    assert len(plain) == len(recomputed) == 28
    assert all(torch.allclose(a, b) for a, b in zip(plain, recomputed, strict=True))


def checkpoint_blocks(model: PeftModel) -> None:
    # renamed between the versions of transformers that qtune works with
    inner = model.get_base_model()
    new = getattr(inner, "activation_checkpointing_enable", None)
    (new or inner.gradient_checkpointing_enable)({"use_reentrant": False})


def test_unquantized_and_bf16(tmp_path: Path) -> None:
    folder = save(tmp_path)
    for quant in (None, Quant(format=None)):
        model = load_base(folder, quant, device=CPU)
        assert model.dtype == torch.bfloat16
        assert not any(isinstance(layer, QuantLinear) for layer in model.modules())
        assert model.config._attn_implementation == attention.NAME
        assert model.config.use_cache is False


def test_saved_folder_loads_as_it_is(tmp_path: Path) -> None:
    model = load(save(tmp_path / "dense"), format="int8", group_size=32)
    model.save_pretrained(tmp_path / "packed")
    packed = batch()
    with torch.no_grad():
        expected = forward_logits(model, packed)
        for settings in ({"format": None}, {"format": "int8", "group_size": 32}):
            again = load(tmp_path / "packed", **settings)
            assert torch.equal(forward_logits(again, packed), expected)


def test_folder_quantized_otherwise_is_refused(tmp_path: Path) -> None:
    load(save(tmp_path / "dense"), format="int8").save_pretrained(tmp_path / "packed")
    with pytest.raises(UserError, match="already quantized, with format int8 and not nf4"):
        load(tmp_path / "packed", format="nf4")
    with pytest.raises(UserError, match="already quantized, with group_size 64 and not 32"):
        load(tmp_path / "packed", format="int8", group_size=32)
    with pytest.raises(UserError, match=r"already quantized, with layers .*q_proj"):
        load(tmp_path / "packed", format="int8", layers={"q_proj": "int4"})
    with pytest.raises(UserError, match="already quantized, with rotate False and not True"):
        load(tmp_path / "packed", format="int8", method="gptq", rotate=True)


def test_method_that_needs_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"quant\.method: gptq measures the model on text"):
        load(save(tmp_path), method="gptq")


def test_adapter_has_the_settings_of_the_recipe(tmp_path: Path) -> None:
    model = load(save(tmp_path))
    settings = Lora(
        rank=4, alpha=6, rslora=True, dropout=0.25, target_modules=("q_proj", "mlp.down_proj"),
        rank_pattern={"down_proj": 2, "layers.0.self_attn.q_proj": 3}, alpha_pattern={"q_proj": 9},
        modules_to_save=("lm_head",),
    )  # fmt: skip
    tuned = add_adapter(model, settings)
    layers = {n: m for n, m in tuned.named_modules() if isinstance(m, QuantLoraLinear)}
    assert {name.split("layers.")[1]: layer.r["default"] for name, layer in layers.items()} == {
        "0.self_attn.q_proj": 3,
        "1.self_attn.q_proj": 4,
        "0.mlp.down_proj": 2,
        "1.mlp.down_proj": 2,
    }
    alphas = {name.split(".")[-1]: layer.lora_alpha["default"] for name, layer in layers.items()}
    assert alphas == {"q_proj": 9, "down_proj": 6}
    trained = {n: p for n, p in tuned.named_parameters() if p.requires_grad}
    assert len(trained) == 9 and any("lm_head" in name for name in trained)
    assert all(parameter.dtype == torch.float32 for parameter in trained.values())
    assert tuned.peft_config["default"].use_rslora


def test_dora_and_the_output_layer_trained_in_full(tmp_path: Path) -> None:
    folder, packed = save(tmp_path), batch()
    expected = forward_logits(load(folder), packed)
    tuned = add_adapter(load(folder), Lora(rank=2, dora=True, modules_to_save=("lm_head",)))
    torch.testing.assert_close(forward_logits(tuned, packed), expected, atol=1e-4, rtol=1e-4)
    losses = [train_step(tuned, packed) for _ in range(3)]
    assert losses[-1] < losses[0]


NAMES = "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ("q_proj", "wq")}, f"target_modules: 'wq' matches no .*: {NAMES}"),
        ({"target_modules": "query"}, f"target_modules: 'query' matches no layer; .*: {NAMES}"),
        ({"target_modules": ("proj",)}, "target_modules: 'proj' matches no layer"),
        ({"modules_to_save": ("q_proj",)}, "modules_to_save: 'q_proj' is quantized"),
        ({"modules_to_save": ("mlp",)}, "modules_to_save: 'mlp' is quantized"),
        ({"modules_to_save": ("head",)}, None),
        ({"modules_to_save": ("score",)}, "modules_to_save: 'score' matches no module"),
        ({"rank_pattern": {"wq": 4}}, f"rank_pattern: 'wq' matches no layer; .*: {NAMES}"),
        ({"alpha_pattern": {"wq": 4}}, "alpha_pattern: 'wq' matches no layer"),
        ({"rank_pattern": {r".*\.q_proj": 4}}, None),
    ],
)
def test_names_that_match_nothing(
    tmp_path: Path, settings: dict[str, Any], message: str | None
) -> None:
    model = load(save(tmp_path))
    if message is None:
        add_adapter(model, Lora(rank=2, **settings))
        return
    with pytest.raises(UserError, match=message):
        add_adapter(model, Lora(rank=2, **settings))
    assert not any(isinstance(layer, QuantLoraLinear) for layer in model.modules())


def test_tokenizer_can_pad(tiny_model: Path) -> None:
    assert load_tokenizer(tiny_model).pad_token == "<|endoftext|>"
