"""Useful operations against a count by PyTorch, and figures that follow from a clock."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from qtune.model.quantizer import QtuneConfig, quantized_on_meta
from qtune.model.scales import TrainedScales
from qtune.quant.linear import QuantLinear
from qtune.train import speed
from qtune.train.speed import Meter, step_flops

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
TOKENS = 24


def adapted(config: Any, target: str | list[str] = "all-linear") -> Any:
    torch.manual_seed(0)
    return get_peft_model(
        AutoModelForCausalLM.from_config(config).float(), LoraConfig(r=4, target_modules=target)
    )


def counted(model: Any, num_targets: int) -> int:
    """Operations of a forward and backward pass that PyTorch runs, attention's products apart."""
    ids = torch.arange(TOKENS)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, logits_to_keep=num_targets, use_cache=False).logits.sum().backward()
    by_operator = counter.get_flop_counts()["Global"]
    return sum(n for operator, n in by_operator.items() if "attention" not in str(operator))


@pytest.mark.parametrize("num_targets", [TOKENS, 5])
def test_as_pytorch_counts_them(num_targets: int) -> None:
    model = adapted(LlamaConfig(**SIZES))
    per_token, per_target = step_flops(model)
    found = per_token * TOKENS + per_target * num_targets
    # the first block needs no gradient of its input: three frozen layers and their A matrices
    into_first = 2 * TOKENS * 32 * (32 + 16 + 16 + 3 * 4)
    assert found - into_first == pytest.approx(counted(model, num_targets), rel=1e-6)


def test_a_frozen_weight_takes_four_a_trained_one_six() -> None:
    model = adapted(LlamaConfig(**SIZES), target=["q_proj"])
    in_blocks = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    trained = 2 * 4 * (32 + 32)
    assert step_flops(model) == (4 * in_blocks + 6 * trained, 4 * 32 * 96)


def test_trained_scales_take_the_gradient_of_their_weight() -> None:
    layer = QuantLinear(64, 24, device="meta")
    both = nn.ModuleList([layer, TrainedScales(layer, zeros=False)])
    assert sum(speed._module_flops(module) for module in both) == 6 * 64 * 24


def test_a_token_takes_its_experts_only() -> None:
    def per_token(num_experts: int, chosen: int) -> float:
        config = Qwen3MoeConfig(
            num_experts=num_experts,
            num_experts_per_tok=chosen,
            moe_intermediate_size=16,
            **SIZES,
        )
        return step_flops(adapted(config, target=["q_proj"]))[0]

    one_expert = 2 * 4 * 3 * 32 * 16
    assert per_token(8, 2) - per_token(8, 1) == one_expert
    assert per_token(16, 2) == per_token(8, 2)


def test_quantized_layers_and_experts_count_as_dense_ones() -> None:
    options = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    with torch.device("meta"):
        dense, packed = (
            AutoModelForCausalLM.from_config(Qwen3MoeConfig(**options, **SIZES)) for _ in range(2)
        )
    quantized_on_meta(packed, QtuneConfig("nf4", 16, ["lm_head"]))
    assert not any(parameter.ndim == 3 for parameter in packed.parameters())
    assert step_flops(packed.requires_grad_(False)) == step_flops(dense.requires_grad_(False))


class Clock:
    """Seconds that only pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(speed.time, "perf_counter", made.perf_counter)
    return made


def test_figures_of_a_step(clock: Clock) -> None:
    model = adapted(LlamaConfig(**SIZES))
    per_token, per_target = step_flops(model)
    meter = Meter(model, 1e9, num_processes=2)
    for _ in range(2):
        # saving and evaluating between steps do not count
        clock.now += 50
        meter.start()
        with meter.waiting():
            clock.now += 0.5
        clock.now += 1
        with meter.waiting():
            clock.now += 0.5
        figures = meter.finish(1000, 200)
        assert figures == {
            "tokens_per_s": 500,
            "supervised_tokens_per_s": 100,
            "data_wait_share": 0.5,
            "mfu": pytest.approx((per_token * 1000 + per_target * 200) / 2 / 2e9),
        }


def test_no_rate_no_mfu(clock: Clock) -> None:
    meter = Meter(adapted(LlamaConfig(**SIZES)), None, 1)
    meter.start()
    clock.now += 1
    assert "mfu" not in meter.finish(10, 5)
