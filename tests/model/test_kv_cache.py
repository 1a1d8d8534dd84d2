import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from qtune.model.kv_cache import (
    GROUP,
    RECENT,
    PackedLayer,
    bits_of_a_number,
    pack,
    packed_cache,
    unpack,
)


def numbers(tokens, width=64, seed=0):
    torch.manual_seed(seed)
    return torch.randn(2, 3, tokens, width)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("group", [(GROUP, 1), (1, GROUP), (1, 64)])
def test_a_number_comes_back_within_half_a_step_of_its_group(bits, group):
    x = numbers(64)
    found = unpack(pack(x, bits, group), bits, torch.float32)
    boxes = x.unflatten(3, (-1, group[1])).unflatten(2, (-1, group[0]))
    reach = boxes.amax((3, 5), keepdim=True) - boxes.amin((3, 5), keepdim=True)
    # the ends of the range are rounded to float16
    bound = (0.5 * reach / (2**bits - 1) + 4e-3).expand_as(boxes).reshape(x.shape)
    assert ((found - x).abs() <= bound).all()


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_equal_numbers_come_back(bits):
    x = torch.full((1, 1, GROUP, 8), 0.75)
    assert torch.equal(unpack(pack(x, bits, (GROUP, 1)), bits, torch.float32), x)


def test_keys_are_packed_by_channel_and_values_by_token():
    """A channel that stands out ruins nothing but itself; so does a token of values."""
    keys, values = numbers(RECENT + GROUP), numbers(RECENT + GROUP, seed=1)
    keys[..., 5] *= 100
    values[:, :, 7] *= 100
    layer = PackedLayer(4)
    layer.update(keys, values)
    found_keys, found_values = layer.update(keys[:, :, :1], values[:, :, :1])
    error = (found_keys[:, :, :GROUP] - keys[:, :, :GROUP]).abs().amax((0, 1, 2))
    assert error.max() == error[5] and error[torch.arange(64) != 5].max() < 0.25
    error = (found_values[:, :, :GROUP] - values[:, :, :GROUP]).abs().amax((0, 1, 3))
    assert error.max() == error[7] and error[torch.arange(GROUP) != 7].max() < 0.25


def test_recent_tokens_stay_as_they_are_and_old_ones_are_packed_once():
    x = numbers(400)
    layer, seen = PackedLayer(4), 0
    first = None
    for size in (1, 100, 27, 1, 200, 71):
        keys, values = layer.update(x[:, :, seen : seen + size], x[:, :, seen : seen + size])
        seen += size
        assert keys.shape == values.shape == x[:, :, :seen].shape
        assert layer.get_seq_length() == seen
        assert torch.equal(keys[:, :, -size:], x[:, :, seen - size : seen])
        if first is None and layer._num_old():
            first = unpack(layer._old[0], 4, torch.float32)
    kept = layer.keys.shape[-2]
    assert RECENT <= kept < RECENT + GROUP and layer._num_old() == 400 - kept
    assert torch.equal(keys[:, :, : first.shape[2]], first)
    assert torch.equal(layer.keys, x[:, :, -kept:])


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_number_takes_the_bits_that_are_planned(bits):
    x = numbers(RECENT + 64 * GROUP).bfloat16()
    layer = PackedLayer(bits)
    layer.update(x, x)
    recent = 2 * layer.keys.nbytes
    packed = 2 * x[:, :, RECENT:].numel() * bits_of_a_number(bits) / 8
    assert layer.nbytes() == recent + packed


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 97}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, max_position_embeddings=512)).eval()


def logits(model, cache, ids, step=16):
    with torch.no_grad():
        parts = [
            model(input_ids=part, past_key_values=cache, use_cache=True).logits
            for part in ids.split(step, 1)
        ]
    return torch.cat(parts, 1)


def test_a_model_sees_its_whole_past_through_it(model):
    ids = torch.randint(0, 97, (2, 320))
    truth = logits(model, DynamicCache(config=model.config), ids)
    errors = {}
    for bits in (8, 4, 2):
        found = logits(model, packed_cache(model.config, bits), ids)
        assert torch.equal(found[:, :RECENT], truth[:, :RECENT])
        errors[bits] = float((found - truth).norm() / truth.norm())
    assert 0 < errors[8] < 1e-3 and errors[8] < errors[4] < errors[2] < 0.2


def test_generating_with_it_goes_on_as_without(model):
    ids = torch.randint(0, 97, (2, 200))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    truth = model.generate(ids, **options)
    cache = packed_cache(model.config, 8)
    found = model.generate(ids, past_key_values=cache, **options)
    assert torch.equal(found, truth) and cache.get_seq_length() == 207


def test_layers_with_a_window_keep_their_own_cache():
    config = LlamaConfig(num_hidden_layers=2)
    config.layer_types, config.sliding_window = ["sliding_attention", "full_attention"], 16
    kinds = [type(layer).__name__ for layer in packed_cache(config, 4).layers]
    assert kinds == ["DynamicSlidingWindowLayer", "PackedLayer"]


def test_a_cache_can_be_used_again(model):
    ids = torch.randint(0, 97, (1, 200))
    cache = packed_cache(model.config, 4)
    before = logits(model, cache, ids)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(logits(model, cache, ids), before)


def test_beams_take_their_past_along(model):
    ids = torch.randint(0, 97, (3, 200))
    cache, order = packed_cache(model.config, 4), torch.tensor([2, 0, 0])
    logits(model, cache, ids)
    cache.reorder_cache(order)
    other = packed_cache(model.config, 4)
    logits(model, other, ids[order])
    for found, truth in zip(cache.layers, other.layers, strict=True):
        after = torch.randn(3, 2, 1, 16)
        for mine, theirs in zip(
            found.update(after, after), truth.update(after, after), strict=True
        ):
            assert torch.allclose(mine, theirs, atol=1e-3)
