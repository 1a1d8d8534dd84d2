"""Which heads are known, and that their loss is the one of the model's own logits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qtune.data.collate import Batch, collate
from qtune.data.sample import Sample
from qtune.machine import CLEAR_REFS, Peak
from qtune.model import attention
from qtune.model.forward import forward_hidden, forward_logits
from qtune.model.head import Head, losses_of_targets, measuring, output_head
from qtune.model.load import register
from qtune.quant.linear import QuantLinear
from qtune.quant.storage import Storage

VOCABULARY = 97
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MAMBA = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
# name -> settings, soft cap, scale
FAMILIES: dict[str, tuple[dict[str, Any], float | None, float]] = {
    "llama": (SMALL, None, 1),
    "qwen3": (SMALL, None, 1),
    # the head has a bias
    "phi": (SMALL, None, 1),
    "gemma2": ({**SMALL, "query_pre_attn_scalar": 8}, 30, 1),
    "granite": ({**SMALL, "logits_scaling": 8.0}, None, 1 / 8),
    "cohere": ({**SMALL, "logit_scale": 0.25}, None, 0.25),
    # runs in float32 up to the head, one sample per row
    "mamba": (MAMBA, None, 1),
}


def build(family: str, dtype: torch.dtype = torch.float32, **settings: Any) -> PreTrainedModel:
    register()
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**{**FAMILIES[family][0], **settings})
    model = AutoModelForCausalLM.from_config(config)
    # large weights, so that what is done to the logits shows
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    attention.use_packed(model)
    return model.to(dtype).eval().requires_grad_(False)


def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    samples = []
    for number, length in enumerate((9, 5, 14)):
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        weights = [float(i > 0 and (i + number) % 3 != 0) for i in range(length)]
        samples.append(Sample(f"t:{number}", ids, weights))
    return collate(samples)


def head_of(model: nn.Module) -> Head:
    head = output_head(model)
    assert head is not None
    return head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_the_models_own_logits(family: str, dtype: torch.dtype) -> None:
    model, given = build(family, dtype), batch()
    head = head_of(model)
    assert (head.finish.softcap, head.finish.scale) == FAMILIES[family][1:]
    found = head.token_losses(forward_hidden(model, given), given.targets)
    logits = forward_logits(model, given).float()
    expected = cross_entropy(logits, given.targets, reduction="none")
    # in 16 bits, models round on the way to the soft cap
    tolerance = 1e-5 if dtype == torch.float32 else 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.mean()))


def test_a_factor_that_is_used_otherwise_than_in_known_models_is_found_out() -> None:
    model = build("granite")
    assert head_of(model).finish.scale == 1 / 8

    class Multiplies(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * self.config.logits_scaling**2
            return output

    model = build("granite")
    model.__class__ = Multiplies
    assert head_of(model).finish.scale == 8


class ForbidsTokens(LlamaForCausalLM):  # type: ignore[misc]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits[..., :3] = -torch.inf
        return output


class Normalizes(LlamaForCausalLM):  # type: ignore[misc]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 1.03 + 0.1
        return output


class Narrows(LlamaForCausalLM):  # type: ignore[misc]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits[..., :-1]
        return output


@pytest.mark.parametrize("kind", [ForbidsTokens, Normalizes, Narrows])
def test_models_that_do_more_have_no_known_head(kind: type[PreTrainedModel]) -> None:
    model = build("llama")
    assert output_head(model) is not None
    model = build("llama")
    model.__class__ = kind
    assert output_head(model) is None
    # what was found is kept
    model.forward = None
    assert output_head(model) is None


def test_the_check_leaves_no_traces() -> None:
    model = build("llama", attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    head_of(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert "forward" not in vars(model)


def test_adapted_heads_and_trained_heads_are_left_to_the_model() -> None:
    config = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
    assert output_head(get_peft_model(build("llama"), LoraConfig(**config))) is not None
    saved = LoraConfig(**config, modules_to_save=["lm_head"])
    assert output_head(get_peft_model(build("llama"), saved)) is None
    config["target_modules"] = ["q_proj", "lm_head"]
    assert output_head(get_peft_model(build("llama"), LoraConfig(**config))) is None
    model = build("llama")
    head_of(model)
    model.lm_head.requires_grad_(True)
    assert output_head(model) is None


def test_on_meta_the_configuration_is_believed_and_quantized_heads_are_not() -> None:
    register()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](**SMALL))
    model.requires_grad_(False)
    assert output_head(model) is not None
    model.lm_head = QuantLinear(32, VOCABULARY, storage=Storage(group_size=32), device="meta")
    assert output_head(model) is None


def test_bytes_of_the_logits_at_a_time() -> None:
    head = head_of(build("llama", torch.bfloat16))
    cpu = torch.device("cpu")
    assert head.logits_bytes(10, cpu) == 64 * VOCABULARY * 2
    most = head.logits_bytes(1 << 30, cpu)
    assert most == head.logits_bytes(1 << 31, cpu) <= 64 << 20


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_gradients_of_weighted_losses_are_those_of_float64(family: str) -> None:
    def gradients(dtype: torch.dtype, losses: Any) -> list[Tensor]:
        model = build(family, dtype, attn_implementation="eager")
        model.model.layers.requires_grad_(True)
        # every token counts differently, as in a preference loss
        factors = torch.linspace(-1, 2, len(given.targets), dtype=dtype)
        (losses(model) * factors).sum().backward()
        return [p.grad for p in model.model.layers.parameters()]

    def in_full(model: PreTrainedModel) -> Tensor:
        return cross_entropy(forward_logits(model, given), given.targets, reduction="none")

    given = batch()
    ours = gradients(torch.float32, lambda model: losses_of_targets(model, given))
    for actual, expected in zip(ours, gradients(torch.float64, in_full), strict=True):
        assert (actual.double() - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("family", ["llama", "cohere"])
def test_without_a_known_head_losses_come_from_logits(family: str) -> None:
    model, given = build(family), batch()
    calls: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    assert output_head(model) is not None
    calls.clear()
    found = losses_of_targets(model, given)
    assert not calls
    model.lm_head.requires_grad_(True)
    through_logits = losses_of_targets(model, given)
    assert calls
    torch.testing.assert_close(through_logits.detach(), found, rtol=1e-4, atol=1e-5)
    through_logits.sum().backward()
    assert model.lm_head.weight.grad is not None


def test_no_matrix_of_logits_is_kept() -> None:
    # 700 targets of 9000 words are 24 MiB; a chunk of 64 rows of them is a tenth
    model = build("llama", vocab_size=9000)
    hidden = torch.randn(700, 32, requires_grad=True)
    targets = torch.arange(700)
    head = head_of(model)
    kept: list[int] = []
    with saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        losses = head.token_losses(hidden, targets)
    assert sum(kept) <= hidden.nbytes
    full = cross_entropy(head.layer(hidden), targets, reduction="none")
    torch.testing.assert_close(losses, full, rtol=1e-4, atol=1e-4)


def test_measuring_leaves_gradients_and_dropout_as_they_were() -> None:
    model = build("llama", attention_dropout=0.5).train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    with pytest.raises(RuntimeError), measuring(model):
        assert not torch.is_grad_enabled()
        assert not any(module.training for module in model.modules())
        raise RuntimeError
    assert torch.is_grad_enabled()
    assert {name: module.training for name, module in model.named_modules()} == before


@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="the peak of a process cannot be reset")
def test_peak_memory_is_a_fraction_of_that_of_full_logits() -> None:
    model = build("llama", vocab_size=16000)
    head, targets = head_of(model), torch.arange(4000)
    hidden = torch.randn(4000, 32, requires_grad=True)
    logits_bytes = 4000 * 16000 * 4

    def peak_of(losses: Callable[[], Tensor]) -> int:
        peak = Peak(torch.device("cpu"))
        losses().sum().backward()
        return peak.bytes()

    full = peak_of(lambda: cross_entropy(head.layer(hidden), targets, reduction="none"))
    ours = peak_of(lambda: head.token_losses(hidden, targets))
    assert full > logits_bytes
    assert ours < logits_bytes / 2
