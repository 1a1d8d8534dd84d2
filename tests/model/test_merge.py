"""Merging against sums taken in float64 from the files of the adapter and the base."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

from qtune.errors import UserError
from qtune.model.load import add_adapter, load_base
from qtune.model.merge import merged_tensors, quant_layers, untied
from qtune.recipe import Lora, Quant

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}
CONFIGS = {
    "llama": LlamaConfig(tie_word_embeddings=True, **SIZES),
    "untied": LlamaConfig(tie_word_embeddings=False, **SIZES),
    "qwen2": Qwen2Config(tie_word_embeddings=False, **SIZES),
    "gpt2": GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=50),
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """A maker of base folders with random weights, biases included."""

    def make(name: str = "llama", dtype: torch.dtype = torch.bfloat16) -> Path:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight) * 0.1)
        model.to(dtype).save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def trained(folder: Path, lora: Lora, quant: Quant | None = None) -> PeftModel:
    model = add_adapter(load_base(folder, quant or Quant(), device=CPU), lora)
    return shake(model)


def shake(model: PeftModel) -> PeftModel:
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.05)
    return model.eval()


def base_weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def delta(model: PeftModel, name: str) -> Tensor:
    """B A in float64, unscaled, from the state of the adapter."""
    state = model.state_dict()
    prefix = f"base_model.model.{name}."
    b, a = (state[f"{prefix}lora_{x}.default.weight"].double() for x in "BA")
    return b @ a


def check_merge(merged: dict[str, Tensor], name: str, expected: Tensor) -> None:
    """The sum in float64, rounded once, but for the rare tie that float32 decides otherwise."""
    found = merged[f"{name}.weight"]
    rounded = expected.to(found.dtype)
    assert (found == rounded).float().mean() > 0.999
    torch.testing.assert_close(found.double(), rounded.double(), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("onto", ["original", "dequantized"])
@pytest.mark.parametrize(
    ("lora", "scalings"),
    [
        (Lora(rank=4, alpha=8), {"q_proj": 2.0, "down_proj": 2.0}),
        (Lora(rank=4, alpha=8, rslora=True), {"q_proj": 4.0, "down_proj": 4.0}),
        (
            Lora(rank=4, alpha=8, rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 32}),
            {"q_proj": 4.0, "down_proj": 8.0},
        ),
    ],
    ids=["lora", "rslora", "patterns"],
)
def test_merge_is_the_sum_rounded_once(
    write: Callable[..., Path], onto: Any, lora: Lora, scalings: dict[str, float]
) -> None:
    folder = write()
    model = trained(folder, lora)
    merged = dict(merged_tensors(folder, model, onto))
    layers = quant_layers(model)
    original = base_weights(folder)
    assert merged.keys() == original.keys()
    for short, scaling in scalings.items():
        names = [name for name in layers if short in name]
        assert names
        for full in names:
            base = original[full] if onto == "original" else layers[full].dequantize(torch.float32)
            name = full.removesuffix(".weight")
            check_merge(merged, name, base.double() + scaling * delta(model, name))


def test_dora_has_the_trained_length_of_each_row(write: Callable[..., Path]) -> None:
    folder = write()
    model = trained(folder, Lora(rank=4, alpha=8, dora=True, target_modules=("k_proj",)))
    merged = dict(merged_tensors(folder, model, "original"))
    name = "model.layers.1.self_attn.k_proj"
    prefix = f"base_model.model.{name}.lora_magnitude_vector.default.weight"
    magnitude = model.state_dict()[prefix].double()
    rows = base_weights(folder)[f"{name}.weight"].double() + 2 * delta(model, name)
    check_merge(merged, name, rows / rows.norm(dim=1, keepdim=True) * magnitude.unsqueeze(1))


def test_dora_merged_onto_dequantized_computes_what_was_trained(write: Callable[..., Path]) -> None:
    folder = write("untied", torch.float32)
    model = add_adapter(
        load_base(folder, Quant(), device=CPU, dtype=torch.float32), Lora(rank=4, dora=True)
    )
    shake(model)
    dense = AutoModelForCausalLM.from_pretrained(folder)
    dense.load_state_dict(dict(merged_tensors(folder, model, "dequantized")))
    ids = torch.arange(12).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(dense(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_untouched_tensors_pass_bit_for_bit(write: Callable[..., Path]) -> None:
    folder = write("qwen2")
    model = trained(folder, Lora(rank=4, target_modules=("q_proj",)))
    merged, original = dict(merged_tensors(folder, model, "original")), base_weights(folder)
    changed = {name for name in original if not torch.equal(merged[name], original[name])}
    assert changed == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}


def test_layers_without_adapter_are_dequantized_too(write: Callable[..., Path]) -> None:
    folder = write("qwen2")
    model = trained(folder, Lora(rank=4, target_modules=("q_proj",)))
    merged, original = dict(merged_tensors(folder, model, "dequantized")), base_weights(folder)
    for name, layer in quant_layers(model).items():
        if "q_proj" not in name:
            assert torch.equal(merged[name], layer.dequantize(torch.bfloat16))
            assert not torch.equal(merged[name], original[name])
    assert torch.equal(merged["model.norm.weight"], original["model.norm.weight"])
    name = "model.layers.0.self_attn.q_proj.bias"
    assert torch.equal(merged[name], original[name])


def test_plain_lora_merges_onto_its_dense_base(write: Callable[..., Path]) -> None:
    folder = write()
    model = trained(folder, Lora(rank=4, alpha=8), Quant(format=None))
    name = "model.layers.0.mlp.up_proj"
    expected = base_weights(folder)[f"{name}.weight"].double() + 2 * delta(model, name)
    for onto in ("original", "dequantized"):
        check_merge(dict(merged_tensors(folder, model, onto)), name, expected)


def test_transposed_layers_merge_transposed(write: Callable[..., Path]) -> None:
    folder = write("gpt2", torch.float32)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    model = shake(get_peft_model(load_base(folder, None, device=CPU), config))
    merged, original = dict(merged_tensors(folder, model, "original")), base_weights(folder)
    name = "transformer.h.0.attn.c_attn"
    stored = name if f"{name}.weight" in original else name.removeprefix("transformer.")
    expected = original[f"{stored}.weight"].double() + 2 * delta(model, name).T
    torch.testing.assert_close(merged[f"{stored}.weight"].double(), expected, rtol=1e-5, atol=1e-6)


def test_folder_of_the_bare_model_is_found(write: Callable[..., Path]) -> None:
    folder = write()
    model = trained(folder, Lora(rank=4, alpha=8))
    tensors = {name.removeprefix("model."): t for name, t in base_weights(folder).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    merged = dict(merged_tensors(folder, model, "original"))
    name = "model.layers.0.mlp.up_proj"
    expected = tensors["layers.0.mlp.up_proj.weight"].double() + 16 / 8 * delta(model, name)
    check_merge(merged, "layers.0.mlp.up_proj", expected)


def test_modules_to_save_replace_the_base(write: Callable[..., Path]) -> None:
    folder = write("untied")
    model = trained(folder, Lora(rank=4, modules_to_save=("lm_head",)))
    merged = dict(merged_tensors(folder, model, "original"))
    key = "base_model.model.lm_head.modules_to_save.default.weight"
    copy = model.state_dict()[key].bfloat16()
    assert torch.equal(merged["lm_head.weight"], copy)
    assert not torch.equal(copy, base_weights(folder)["lm_head.weight"])
    assert not untied(model)


def test_training_one_of_two_tied_tensors_unties_them(write: Callable[..., Path]) -> None:
    folder = write("llama")
    with pytest.warns(UserWarning, match="tie"):
        model = trained(folder, Lora(rank=4, modules_to_save=("lm_head",)))
    merged, original = dict(merged_tensors(folder, model, "original")), base_weights(folder)
    assert "lm_head.weight" not in original and untied(model)
    assert torch.equal(merged["model.embed_tokens.weight"], original["model.embed_tokens.weight"])
    key = "base_model.model.lm_head.modules_to_save.default.weight"
    assert torch.equal(merged["lm_head.weight"], model.state_dict()[key].bfloat16())


def test_duplicate_of_a_tied_tensor_is_left_out(write: Callable[..., Path]) -> None:
    folder = write("llama")
    tensors = base_weights(folder)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = trained(folder, Lora(rank=4))
    assert "lm_head.weight" not in dict(merged_tensors(folder, model, "original"))


def test_trained_biases_are_merged(write: Callable[..., Path]) -> None:
    folder = write("qwen2")
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], lora_bias=True, lora_alpha=8
    )
    model = shake(get_peft_model(load_base(folder, Quant(), device=CPU), config))
    merged, original = dict(merged_tensors(folder, model, "original")), base_weights(folder)
    name = "model.layers.0.self_attn.q_proj"
    added = model.state_dict()[f"base_model.model.{name}.lora_B.default.bias"].double() * 2
    expected = (original[f"{name}.bias"].double() + added).bfloat16()
    torch.testing.assert_close(merged[f"{name}.bias"], expected)
    assert not torch.equal(expected, original[f"{name}.bias"])


def test_base_biases_that_were_trained_replace_the_base(write: Callable[..., Path]) -> None:
    folder = write("qwen2")
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], bias="lora_only")
    model = shake(get_peft_model(load_base(folder, None, device=CPU), config))
    merged, original = dict(merged_tensors(folder, model, "original")), base_weights(folder)
    name = "model.layers.0.self_attn.{}.bias"
    live = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.bias
    assert torch.equal(merged[name.format("q_proj")], live)
    assert not torch.equal(live, original[name.format("q_proj")])
    assert torch.equal(merged[name.format("k_proj")], original[name.format("k_proj")])


def test_float32_base_is_rounded_when_asked(write: Callable[..., Path]) -> None:
    folder = write("llama", torch.float32)
    model = trained(folder, Lora(rank=4, alpha=8))
    merged = dict(merged_tensors(folder, model, "original", round_to=torch.bfloat16))
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    name = "model.layers.0.mlp.up_proj"
    expected = base_weights(folder)[f"{name}.weight"].double() + 2 * delta(model, name)
    check_merge(merged, name, expected)
    kept = dict(merged_tensors(folder, model, "original"))
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}


def test_adapter_without_effect_is_an_error(write: Callable[..., Path]) -> None:
    folder = write()
    model = add_adapter(load_base(folder, Quant(), device=CPU), Lora(rank=4))
    with pytest.raises(UserError, match="changed no weight: the adapter is zero"):
        list(merged_tensors(folder, model, "dequantized"))
    merged = dict(merged_tensors(folder, model, "original", allow_unchanged=True))
    assert all(torch.equal(merged[name], t) for name, t in base_weights(folder).items())


def test_adapter_that_matches_no_tensor_is_an_error(write: Callable[..., Path]) -> None:
    folder = write()
    model = trained(folder, Lora(rank=4))
    tensors = base_weights(folder)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 of the tensors .*layers.1.mlp.up_proj.weight"):
        merged_tensors(folder, model, "original")


def test_adapter_with_nan_is_an_error(write: Callable[..., Path]) -> None:
    folder = write()
    model = trained(folder, Lora(rank=4))
    with torch.no_grad():
        next(w for name, w in model.named_parameters() if "lora_B" in name)[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"q_proj.weight: the merged weight is not finite"):
        list(merged_tensors(folder, model, "original"))


def test_adapter_that_is_merged_in_place_is_an_error(write: Callable[..., Path]) -> None:
    folder = write()
    model = trained(folder, Lora(rank=4))
    model.merge_adapter()
    with pytest.raises(UserError, match="merged into this layer in place"):
        merged_tensors(folder, model, "dequantized")


def test_trained_scales_are_merged_onto_codes_alone(write: Callable[..., Path]) -> None:
    folder = write()
    base = load_base(folder, Quant(), device=CPU)
    model = shake(add_adapter(base, Lora(rank=4, alpha=8)))
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    layer.train_scales(zeros=False)
    with torch.no_grad():
        layer.trained_scales.scales.mul_(1.5)
    tuned = layer.trained_scales.tuned(layer.quantized)
    layer.trained_scales = None
    layer.settle(tuned)
    with pytest.raises(UserError, match="trained scales and zero points are those of codes"):
        merged_tensors(folder, model, "original")
    name = "model.layers.0.mlp.up_proj"
    merged = dict(merged_tensors(folder, model, "dequantized"))
    weight = tuned.dequantize(torch.float32).double()
    check_merge(merged, name, weight + 2 * delta(model, name))


@pytest.mark.parametrize("quant", [Quant(), Quant(format="int4", group_size="row")], ids=str)
def test_quantized_folder_has_no_original_weights(
    quant: Quant, write: Callable[..., Path], tmp_path: Path
) -> None:
    folder = write()
    load_base(folder, quant, device=CPU).save_pretrained(tmp_path / "quantized")
    base = load_base(tmp_path / "quantized", None, device=CPU)
    model = shake(add_adapter(base, Lora(rank=4, alpha=8)))
    with pytest.raises(UserError, match="no original weights"):
        merged_tensors(tmp_path / "quantized", model, "original")
    merged = dict(merged_tensors(tmp_path / "quantized", model, "dequantized"))
    assert merged.keys() == base_weights(folder).keys()
    name = "model.layers.0.mlp.up_proj"
    base = quant_layers(model)[f"{name}.weight"].dequantize(torch.float32)
    check_merge(merged, name, base.double() + 2 * delta(model, name))
