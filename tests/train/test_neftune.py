"""Noise on embeddings: transformers' on single samples, each sample's own in a packed row."""

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, MambaConfig
from transformers.integrations.neftune import neftune_post_forward_hook

from qtune.data.collate import collate
from qtune.data.sample import Sample
from qtune.model import attention
from qtune.model.forward import forward_logits, inner_model
from qtune.train.neftune import noisy_embeddings

attention.register()
ALPHA, HIDDEN = 5.0, 64
SIZES = {"vocab_size": 50, "hidden_size": HIDDEN, "num_hidden_layers": 2}


def llama(*, packed: bool) -> Any:
    config = LlamaConfig(num_attention_heads=2, intermediate_size=32, **SIZES)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    if packed:
        attention.use_packed(model)
    return get_peft_model(model.float(), LoraConfig(r=2, target_modules="all-linear")).train()


def samples(*lengths: int) -> list[Sample]:
    return [Sample(f"row {n}", list(range(1, n + 1)), [1.0] * n) for n in lengths]


def embeddings(model: nn.Module, rows: list[Sample], alpha: float | None, **options: Any) -> Tensor:
    """What the decoder gets in a forward pass with the random numbers of seed 7."""
    seen: list[Tensor] = []
    layer = inner_model(model).get_input_embeddings()
    torch.manual_seed(7)
    batch = collate(rows, **options)
    with noisy_embeddings(model, alpha, batch.lengths):
        # hooks run in the order they were registered
        hook = layer.register_forward_hook(lambda module, args, output: seen.append(output))
        forward_logits(model, batch)
        hook.remove()
    return seen[0].detach()


@pytest.mark.parametrize("packed", [True, False])
def test_a_single_sample_gets_the_noise_of_transformers(packed: bool) -> None:
    model = llama(packed=packed)
    ours = embeddings(model, samples(8), ALPHA, packing=packed)
    layer = inner_model(model).get_input_embeddings()
    layer.neftune_noise_alpha = ALPHA
    torch.manual_seed(7)
    theirs = neftune_post_forward_hook(layer, (), layer(torch.arange(1, 9)[None]))
    assert float((ours - embeddings(model, samples(8), None)).abs().max()) > 0.1
    torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=1e-6)


def test_filling_does_not_count() -> None:
    model = llama(packed=True)
    ours = embeddings(model, samples(7), ALPHA, multiple=16)
    noise = ours - embeddings(model, samples(7), None, multiple=16)
    assert 0.9 < float(noise[0, :7].abs().max()) * math.sqrt(7 * HIDDEN) / ALPHA <= 1 + 1e-5
    padded = embeddings(model, samples(7), ALPHA, packing=False)
    noise = padded - embeddings(model, samples(7), None, packing=False)
    assert padded.shape[1] == 8
    assert 0.9 < float(noise.abs().max()) * math.sqrt(7 * HIDDEN) / ALPHA <= 1 + 1e-5


def test_each_sample_of_a_packed_row_has_noise_for_its_own_length() -> None:
    model = llama(packed=True)
    rows = samples(4, 25, 9)
    noise = embeddings(model, rows, ALPHA) - embeddings(model, rows, None)
    for part, length in zip(noise[0].split([4, 25, 9]), (4, 25, 9), strict=True):
        most = ALPHA / math.sqrt(length * HIDDEN)
        assert 0.9 * most < float(part.abs().max()) <= most * (1 + 1e-5)
        # uniform: its standard deviation
        assert float(part.std()) == pytest.approx(most / math.sqrt(3), rel=0.1)


@pytest.mark.parametrize("packing", [True, False])
def test_padded_rows_have_noise_for_their_samples_and_not_for_their_width(packing: bool) -> None:
    config = MambaConfig(state_size=4, **SIZES)
    model = AutoModelForCausalLM.from_config(config) if packing else llama(packed=True)
    rows = samples(4, 25)
    given = [embeddings(model.train(), rows, a, packing=packing) for a in (ALPHA, None)]
    noise = given[0] - given[1]
    for row, length in enumerate((4, 25)):
        most = ALPHA / math.sqrt(length * HIDDEN)
        assert 0.9 * most < float(noise[row, :length].abs().max()) <= most * (1 + 1e-5)


def test_none_in_evaluation_and_none_is_left_behind() -> None:
    model = llama(packed=True)
    clean = embeddings(model, samples(8), None)
    assert torch.equal(embeddings(model.eval(), samples(8), ALPHA), clean)
    model.train()
    assert not torch.equal(embeddings(model, samples(8), ALPHA), clean)
    assert torch.equal(embeddings(model, samples(8), None), clean)
    assert not inner_model(model).get_input_embeddings()._forward_hooks


def test_the_same_random_numbers_give_the_same_noise() -> None:
    model = llama(packed=True)
    state = torch.get_rng_state()
    first = embeddings(model, samples(5, 6), ALPHA)
    torch.set_rng_state(state)
    assert torch.equal(embeddings(model, samples(5, 6), ALPHA), first)
    assert not torch.equal(first[0, :5], embeddings(model, samples(5, 6), 2 * ALPHA)[0, :5])


def test_keeps_the_dtype_of_the_embeddings() -> None:
    model = llama(packed=True).bfloat16()
    assert embeddings(model, samples(8), ALPHA).dtype == torch.bfloat16
