import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from qtune.evaluate.long_context import FIRST, MOST_TOKENS, cache_effect, long_rows


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 97}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, max_position_embeddings=512)).eval()


def test_texts_are_joined_to_rows_as_long_as_the_model_takes():
    texts = [list(range(100))] * 11
    rows = long_rows(texts, LlamaConfig(max_position_embeddings=512))
    assert [row.shape[1] for row in rows] == [512, 512]
    assert rows[0][0].tolist() == [i % 100 for i in range(512)]


def test_little_text_makes_no_row():
    assert long_rows([[1] * (FIRST + 1)], LlamaConfig()) == []


def test_rows_have_an_end_where_the_model_has_none():
    config = LlamaConfig(max_position_embeddings=10**6)
    assert long_rows([[1] * 9000], config)[0].shape[1] == MOST_TOKENS


def test_the_16_bit_loss_is_that_of_the_whole_row_at_once(model):
    row = torch.randint(0, 97, (1, 400))
    effect = cache_effect(model, [row], 8)
    with torch.no_grad():
        logits = model(row).logits[0]
    truth = cross_entropy(logits[FIRST:-1], row[0, FIRST + 1 :]).item()
    assert effect.loss_16bit == pytest.approx(truth, rel=1e-5)
    assert (effect.tokens, effect.context) == (399 - FIRST, 400)


def test_fewer_bits_cost_more_and_take_less(model):
    rows = [torch.randint(0, 97, (1, 512))]
    effects = [cache_effect(model, rows, bits) for bits in (8, 4, 2)]
    divergences = [effect.kl for effect in effects]
    assert 0 <= divergences[0] < 1e-5 and divergences == sorted(divergences)
    assert all(effect.loss == pytest.approx(effect.loss_16bit, abs=0.05) for effect in effects)
    sizes = [effect.cache_bytes for effect in effects]
    assert sizes == sorted(sizes, reverse=True)
    # keys and values of 512 tokens in float32, 2 heads of 16, 2 layers
    assert all(effect.cache_bytes_16bit == 2 * 2 * 2 * 16 * 512 * 4 for effect in effects)


def test_the_model_is_left_as_it_was(model):
    model.train()
    cache_effect(model, [torch.randint(0, 97, (1, 300))], 4)
    assert model.training
    model.eval()
