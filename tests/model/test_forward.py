"""What comes out of a batch against each sample run alone, through transformers' own defaults."""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qtune.data.collate import Batch, collate
from qtune.data.order import PADDING_MULTIPLE, micro_batches
from qtune.data.sample import Sample
from qtune.errors import UserError
from qtune.model import attention
from qtune.model.forward import (
    check_packing,
    forward_hidden,
    forward_logits,
    inner_model,
    packs,
    takes_logits_to_keep,
)
from qtune.recipe import Train
from qtune.train.objective import load_objective
from qtune_kernels.cpu import tiles

VOCABULARY = 97
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
FAMILIES = {
    "llama": SMALL,
    "qwen3": {**SMALL, "head_dim": 8},
    # a window shorter than the samples
    "mistral": {**SMALL, "sliding_window": 4},
    "gpt_neox": SMALL,
    "gpt2": GPT2,
}
# state instead of attention: packing would leak
MAMBA = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}


class LlamaOfBefore(LlamaForCausalLM):  # type: ignore[misc]
    """Its forward cannot restrict itself to some logits, as in code that comes with models."""

    def forward(self, input_ids: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        return super().forward(input_ids, attention_mask, **kwargs)


@pytest.fixture(autouse=True)
def registered() -> None:
    attention.register()


def build(family: str, settings: dict[str, object], implementation: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    # large weights, so that a token seen by mistake shows
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def samples(lengths: tuple[int, ...] = (9, 5, 14, 2)) -> list[Sample]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for number, length in enumerate(lengths):
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        weights = [float(i > 0 and (i + number) % 3 != 0) for i in range(length)]
        made.append(Sample(f"t:{number}", ids, weights))
    return made


def alone(model: nn.Module, parts: list[Sample]) -> Tensor:
    """Logits [N, V] before each supervised token, one sample after the other."""
    rows = []
    for part in parts:
        logits = model(input_ids=torch.tensor([part.ids])).logits[0]
        rows += [logits[i - 1] for i in range(1, len(part.ids)) if part.supervised[i]]
    return torch.stack(rows)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", attention.NAME])
@pytest.mark.parametrize("family", FAMILIES)
def test_samples_do_not_see_each_other(family: str, implementation: str) -> None:
    settings = FAMILIES[family]
    parts = samples()
    expected = alone(build(family, settings, "sdpa"), parts)
    close(forward_logits(build(family, settings, implementation), collate(parts)), expected)


@pytest.mark.parametrize("implementation", ["sdpa", attention.NAME])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_hidden_states_are_those_that_make_the_logits(family: str, implementation: str) -> None:
    model, parts = build(family, FAMILIES[family], implementation), samples()
    hidden = forward_hidden(model, collate(parts))
    close(model.get_output_embeddings()(hidden), alone(model, parts))


def test_a_packed_row_run_plainly_is_not_the_truth() -> None:
    # what the tests above would miss if the random model hardly looked at other tokens
    model, parts = build("llama", SMALL, "sdpa"), samples()
    batch = collate(parts)
    mixed = model(input_ids=batch.input_ids).logits[0, batch.predicts]
    assert (mixed - alone(model, parts)).abs().max() > 0.1


def test_recurrent_model_is_never_packed() -> None:
    parts = samples()
    model = build("mamba", MAMBA, "eager")
    model.config._attn_implementation = attention.NAME
    close(forward_logits(model, collate(parts)), alone(model, parts))


@pytest.mark.parametrize("implementation", ["sdpa", attention.NAME])
def test_model_that_cannot_restrict_its_logits(implementation: str) -> None:
    parts = samples()
    known = build("llama", SMALL, implementation)
    model = LlamaOfBefore(known.config).eval()
    model.load_state_dict(known.state_dict())
    assert takes_logits_to_keep(known) and not takes_logits_to_keep(model)
    close(forward_logits(model, collate(parts)), alone(model, parts))


@pytest.mark.parametrize("implementation", ["sdpa", attention.NAME])
def test_only_the_wanted_logits_are_made(implementation: str) -> None:
    model = build("llama", SMALL, implementation)
    seen = []
    model.lm_head.register_forward_hook(lambda module, given, made: seen.append(made.shape[:-1]))
    parts = samples((6, 6, 6))
    for part in parts:
        part.weights[:] = [0.0] * 4 + [1.0] * 2
    forward_logits(model, collate(parts))
    assert [shape.numel() for shape in seen] == [6]


@pytest.mark.parametrize("implementation", ["sdpa", attention.NAME])
def test_gradients_are_those_of_the_samples_alone(implementation: str) -> None:
    parts = samples()
    batch = collate(parts)

    def gradients(logits: Callable[[nn.Module], Tensor]) -> list[Tensor]:
        model = build("llama", SMALL, implementation)
        nn.functional.cross_entropy(logits(model), batch.targets).backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    for actual, expected in zip(
        gradients(lambda model: forward_logits(model, batch)),
        gradients(lambda model: alone(model, parts)),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-3)


def spied(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[None]:
    """Grows with each call of that function of the module."""
    calls: list[None] = []
    own = getattr(module, name)

    def spy(*given: Any, **options: Any) -> Any:
        calls.append(None)
        return own(*given, **options)

    monkeypatch.setattr(module, name, spy)
    return calls


# lengths of samples that each way of attending is taken for: laid side by side in one call, or in
# one for each of three runs: 30, then 2, 3 and 1, then 4
SIDE_BY_SIDE, IN_RUNS = (9, 8, 10, 9), (30, 2, 3, 1, 4)
WAYS = {
    "side by side": (attention.NAME, SIDE_BY_SIDE, True),
    "in runs": (attention.NAME, IN_RUNS, True),
    "one per row": (attention.NAME, IN_RUNS, False),
    "one per row by the model": ("sdpa", IN_RUNS, False),
}


@pytest.mark.parametrize(("implementation", "lengths", "packing"), WAYS.values(), ids=WAYS)
def test_others_beside_it_change_nothing_for_a_sample(
    implementation: str, lengths: tuple[int, ...], packing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, parts = build("llama", SMALL, implementation), samples(lengths)
    for kept in range(len(parts)):
        single = forward_logits(model, collate([parts[kept]], packing=packing))
        calls = spied(monkeypatch, attention, "_causal")
        batch = collate(parts, packing=packing)
        beside = forward_logits(model, batch)[batch.sample_of == kept]
        # in each of two layers
        assert len(calls) == {True: 2 if lengths == SIDE_BY_SIDE else 6, False: 0}[packing]
        torch.testing.assert_close(beside, single, atol=2e-5, rtol=1e-5)
        # and what the others hold
        for other in set(range(len(parts))) - {kept}:
            parts[other].ids[:] = [3 + token % 90 for token in parts[other].ids]
        again = forward_logits(model, collate(parts, packing=packing))[batch.sample_of == kept]
        assert torch.equal(again, beside)


def loss_and_gradients(
    model: nn.Module, parts: list[Sample], max_tokens: int, *, packing: bool
) -> tuple[Tensor, list[Tensor]]:
    """The mean loss of a step in micro-batches, and the gradients it leaves."""
    model.zero_grad()
    objective = load_objective(Train(steps=1))
    total = torch.zeros(())
    for group in micro_batches(parts, max_tokens, packing=packing):
        loss, _ = objective.loss(model, collate(group, multiple=16, packing=packing), None)
        (loss / objective.count(parts)).backward()
        total += loss.detach() / objective.count(parts)
    return total, [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("lengths", [SIDE_BY_SIDE, IN_RUNS], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_loss_and_gradients_are_the_unpacked_ones(
    family: str, lengths: tuple[int, ...]
) -> None:
    parts = samples(lengths)
    plain, packed = (build(family, FAMILIES[family], name) for name in ("sdpa", attention.NAME))
    assert packs(packed) and not packs(plain)
    # one sample in each row and step
    loss, gradients = loss_and_gradients(plain, parts, 1, packing=False)
    for model, packing, max_tokens in [
        (packed, True, 1000),
        (packed, True, 32),
        (packed, False, 1000),
        (plain, False, 1000),
    ]:
        found, others = loss_and_gradients(model, parts, max_tokens, packing=packing)
        torch.testing.assert_close(found, loss, atol=0, rtol=1e-6)
        for ours, theirs in zip(others, gradients, strict=True):
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-7


@pytest.mark.skipif(not tiles.available(), reason="this processor has no AMX")
@pytest.mark.parametrize("lengths", [SIDE_BY_SIDE, IN_RUNS], ids=str)
def test_kernels_that_take_packed_rows_are_no_less_exact(
    lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SMALL, "hidden_size": 128}
    parts, calls = samples(lengths), spied(monkeypatch, attention.kernels, "packed_attention")
    truth = build("llama", settings, "sdpa").to(torch.bfloat16).double()
    rows = build("llama", settings, "sdpa").to(torch.bfloat16)
    packed = build("llama", settings, attention.NAME).to(torch.bfloat16)
    expected, right = loss_and_gradients(truth, parts, 1, packing=False)
    unpacked, theirs = loss_and_gradients(rows, parts, 1, packing=False)
    assert not calls
    found, ours = loss_and_gradients(packed, parts, 1000, packing=True)
    assert len(calls) == 2
    assert abs(found - expected) <= 2 * abs(unpacked - expected) + 0.01 * expected
    for a, b, exact in zip(ours, theirs, right, strict=True):
        allowed = 2 * (b - exact).norm() + 1e-3 * exact.norm()
        assert (a - exact).norm() <= allowed


@pytest.mark.parametrize("implementation", ["sdpa", attention.NAME])
def test_padded_rows_are_a_multiple_long(implementation: str) -> None:
    model = build("llama", SMALL, implementation)
    seen = []
    model.model.register_forward_pre_hook(
        lambda module, given, named: seen.append(named["input_ids"].shape), with_kwargs=True
    )
    forward_logits(model, collate(samples((9, 5, 3)), packing=False))
    forward_logits(model, collate(samples((8, 5)), packing=False))
    assert PADDING_MULTIPLE == 8 and seen == [(3, 16), (2, 8)]


@pytest.mark.parametrize("implementation", ["sdpa", attention.NAME])
def test_wrapped_models(implementation: str) -> None:
    plain = build("llama", SMALL, implementation)
    batch: Batch = collate(samples())
    expected = forward_logits(plain, batch)
    config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(copy.deepcopy(plain), config)
    assert inner_model(tuned) is tuned.base_model.model
    # a fresh adapter changes nothing
    torch.testing.assert_close(forward_logits(tuned, batch), expected)
    assert torch.equal(forward_hidden(tuned, batch), forward_hidden(plain, batch))
    assert inner_model(torch.compile(plain)) is plain


def test_the_model_has_its_own_forward_again_even_after_an_error() -> None:
    model, batch = build("llama", SMALL, "sdpa"), collate(samples())
    expected = forward_logits(model, batch)
    forward_hidden(model, batch)
    assert torch.equal(forward_logits(model, batch), expected)
    norm, model.model.norm = model.model.norm, None
    with pytest.raises(TypeError):
        forward_hidden(model, batch)
    model.model.norm = norm
    assert torch.equal(forward_logits(model, batch), expected)
    # such as accelerate puts in
    model.forward = own = functools.partial(type(model).forward, model)
    forward_hidden(model, batch)
    assert model.forward is own


@pytest.fixture
def one_process() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("forward", [forward_logits, forward_hidden])
def test_gradients_pass_through_the_hooks_of_parallel_training(
    forward: Callable[[nn.Module, Batch], Tensor],
) -> None:
    model = build("llama", SMALL, attention.NAME).requires_grad_(False)
    model.model.layers.requires_grad_(True)
    wrapped = DistributedDataParallel(model)
    seen = []

    def hook(_: object, bucket: distributed.GradBucket) -> torch.futures.Future[Tensor]:
        seen.extend(bucket.parameters())
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    wrapped.register_comm_hook(None, hook)
    forward(wrapped, collate(samples())).sum().backward()
    assert len(seen) == len(list(model.model.layers.parameters()))


PACKING = ["llama", "qwen3", "mistral", "gpt_neox", "gpt2"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", PACKING)
def test_packing_is_checked(family: str, dtype: torch.dtype) -> None:
    model = build(family, FAMILIES[family], attention.NAME).to(dtype)
    check_packing(model)
    assert model.config._attn_implementation == attention.NAME


@pytest.mark.parametrize("family", PACKING)
def test_attention_that_sees_other_samples_is_refused(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(family, FAMILIES[family], attention.NAME)
    plain = attention.packed_inputs

    def one_sample(positions: Tensor, lengths: Any) -> dict[str, Any]:
        return plain(positions, [sum(lengths)])

    monkeypatch.setattr(attention, "packed_inputs", one_sample)
    with pytest.raises(UserError, match=f"{type(model).__name__} cannot be trained on packed rows"):
        check_packing(model)


def test_attention_that_is_not_softmax_is_refused() -> None:
    settings = {**SMALL, "head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 0.5}
    with pytest.raises(UserError, match="Gemma2ForCausalLM cannot be trained on packed rows"):
        check_packing(build("gemma2", settings, attention.NAME))


def test_nothing_is_run_for_a_model_that_is_not_packed() -> None:
    model = build("llama", SMALL, "sdpa")
    model.forward = None
    check_packing(model)


def test_adapted_model_is_checked() -> None:
    model = build("llama", SMALL, attention.NAME)
    config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    check_packing(get_peft_model(model, config))
