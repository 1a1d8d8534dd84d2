"""Packed rows against one call per sample, in float64 and through transformers' own SDPA."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qtune.model import attention
from qtune.model.attention import packed_attention, packed_inputs, use_packed
from qtune_kernels.cpu import tiles

LENGTHS = {
    "even": (5, 5, 5),
    "similar": (7, 5, 6, 8),
    "one": (11,),
    "very different": (40, 1, 3, 2, 1),
    "single tokens": (1, 1, 1),
}
SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(autouse=True)
def registered() -> None:
    attention.register()


def inputs(
    lengths: tuple[int, ...], kv_heads: int, dtype: torch.dtype, width: int = 16
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    shapes = [(1, heads, sum(lengths), width) for heads in (4, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def truth(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """Attention [1, T, H, D] of one sample, written out in float64."""
    k, v = (t.double().repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q.double() @ k.transpose(2, 3) * scale
    at = torch.arange(q.shape[2])
    distance = at[:, None] - at[None, :]
    seen = (distance >= 0) & (distance < (window or len(at)))
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_samples_apart_against_float64(
    lengths: tuple[int, ...], kv_heads: int, window: int | None
) -> None:
    q, k, v = inputs(lengths, kv_heads, torch.float32)
    y, _ = packed_attention(
        nn.Module(), q, k, v, None, sample_lengths=lengths, scaling=0.3, sliding_window=window
    )
    parts = zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2), strict=True)
    expected = torch.cat([truth(*part, 0.3, window) for part in parts], 1)
    assert y.shape == (1, sum(lengths), 4, 16)
    torch.testing.assert_close(y.double(), expected, atol=2e-6, rtol=1e-5)
    dy = torch.randn(y.shape)
    found = torch.autograd.grad(y, (q, k, v), dy)
    right = torch.autograd.grad(expected, (q, k, v), dy.double())
    for ours, theirs in zip(found, right, strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_no_less_exact_than_sdpa_in_16_bits(
    lengths: tuple[int, ...], dtype: torch.dtype, width: int
) -> None:
    q, k, v = inputs(lengths, 2, dtype, width)
    y, _ = packed_attention(nn.Module(), q, k, v, None, sample_lengths=lengths, scaling=0.25)
    assert y.dtype == dtype
    plain = nn.functional.scaled_dot_product_attention
    parts = list(zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2), strict=True))
    expected = torch.cat([truth(*part, 0.25, None) for part in parts], 1)
    theirs = torch.cat(
        [plain(*p, is_causal=True, scale=0.25, enable_gqa=True).transpose(1, 2) for p in parts], 1
    )
    allowed = 2 * (theirs.double() - expected).norm() + 1e-6 * expected.norm()
    assert (y.double() - expected).norm() <= allowed


@pytest.mark.parametrize("lengths", [LENGTHS["similar"], LENGTHS["very different"]], ids=str)
def test_nothing_leaks_between_samples(lengths: tuple[int, ...]) -> None:
    q, k, v = inputs(lengths, 2, torch.float32)
    y, _ = packed_attention(nn.Module(), q, k, v, None, sample_lengths=lengths)
    for tensor in (q, k, v):
        tensor.data[:, :, : lengths[0]] = torch.nan
    again, _ = packed_attention(nn.Module(), q, k, v, None, sample_lengths=lengths)
    assert torch.equal(again[:, lengths[0] :], y[:, lengths[0] :])


@pytest.mark.parametrize(
    ("sizes", "runs"),
    [
        ([7, 5, 6, 8], [[7, 5, 6, 8]]),
        ([100, 60, 40, 9, 8], [[100, 60, 40], [9, 8]]),
        ([4, 30, 28, 1, 1], [[4], [30, 28], [1, 1]]),
        ([5], [[5]]),
    ],
)
def test_samples_of_similar_length_share_a_call(sizes: list[int], runs: list[list[int]]) -> None:
    assert attention._runs(sizes) == runs


def test_dropout_is_applied() -> None:
    q, k, v = inputs((8, 8), 4, torch.float32)
    torch.manual_seed(0)
    dropped, _ = packed_attention(nn.Module(), q, k, v, None, sample_lengths=(8, 8), dropout=0.5)
    kept, _ = packed_attention(nn.Module(), q, k, v, None, sample_lengths=(8, 8), dropout=0.0)
    assert not torch.allclose(dropped, kept)


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows with each call of the op."""
    calls, op = [], attention.kernels.packed_attention

    def spy(*arguments: Any) -> Any:
        calls.append(arguments)
        return op(*arguments)

    monkeypatch.setattr(attention.kernels, "packed_attention", spy)
    return calls


needs_amx = pytest.mark.skipif(not tiles.available(), reason="this processor has no AMX")


@needs_amx
@pytest.mark.parametrize("window", [None, 3])
def test_rows_that_a_kernel_takes_get_to_it(kernel_calls: list[Any], window: int | None) -> None:
    lengths = LENGTHS["similar"]
    q, k, v = inputs(lengths, 2, torch.bfloat16, 32)
    settings = {"sample_lengths": lengths, "scaling": 0.25, "sliding_window": window}
    y, _ = packed_attention(nn.Module(), q, k, v, None, **settings)
    assert len(kernel_calls) == 1
    dy = torch.randn(y.shape).bfloat16()
    wide = [tensor.detach().float().requires_grad_() for tensor in (q, k, v)]
    right, _ = packed_attention(nn.Module(), *wide, None, **settings)
    assert len(kernel_calls) == 1
    ours = [y, *torch.autograd.grad(y, (q, k, v), dy)]
    theirs = [right, *torch.autograd.grad(right, wide, dy.float())]
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one - other).norm() < 0.005 * other.norm()


@needs_amx
def test_dropout_and_devices_without_a_kernel_take_sdpa(kernel_calls: list[Any]) -> None:
    q, k, v = inputs((8, 8), 4, torch.bfloat16, 32)
    packed_attention(nn.Module(), q, k, v, None, sample_lengths=(8, 8), dropout=0.5)
    q, k, v = (tensor.to("meta") for tensor in (q, k, v))
    with attention.standing_for("cuda"):
        packed_attention(nn.Module(), q, k, v, None, sample_lengths=(8, 8))
    assert not kernel_calls
    with attention.standing_for("cpu"):
        y, _ = packed_attention(nn.Module(), q, k, v, None, sample_lengths=(8, 8))
    assert len(kernel_calls) == 1 and y.is_meta and y.shape == (1, 16, 4, 32)


def test_on_meta_sdpa_works_in_the_dtype_of_the_device() -> None:
    shape, seen = (1, 4, 8, 16), []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            if func is nn.functional.scaled_dot_product_attention:
                seen.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    q, k, v = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for _ in range(3))
    for device in ("cpu", "cuda"):
        with attention.standing_for(device), Watch():
            packed_attention(nn.Module(), q, k, v, None, sample_lengths=(8,))
    assert seen == [torch.float32, torch.bfloat16]


def test_without_lengths_it_is_transformers_sdpa() -> None:
    q, k, v = inputs((6,), 4, torch.float32)
    mask = torch.rand(1, 1, 6, 6) > 0.3
    mask |= torch.eye(6, dtype=torch.bool)
    options: dict[str, Any] = {"scaling": 0.2, "dropout": 0.0, "is_causal": False}
    module = nn.Module()
    ours, _ = packed_attention(module, q, k, v, mask, **options)
    theirs, _ = sdpa_attention_forward(module, q, k, v, mask, **options)
    assert torch.equal(ours, theirs)


def build(family: str, implementation: str | None = None, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**{**SMALL, **settings})
    options = {"attn_implementation": implementation} if implementation else {}
    model = AutoModelForCausalLM.from_config(config, **options)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.mark.parametrize("settings", [{}, {"sliding_window": 4}], ids=["full", "window"])
def test_generation_and_padded_batches_are_those_of_sdpa(settings: dict[str, Any]) -> None:
    ours, theirs = (
        build("mistral", implementation, **settings) for implementation in (attention.NAME, "sdpa")
    )
    ids = torch.randint(3, 97, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        found, expected = (m(input_ids=ids, attention_mask=mask).logits for m in (ours, theirs))
        assert torch.equal(found, expected)
        options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask}
        assert torch.equal(ours.generate(ids, **options), theirs.generate(ids, **options))


def test_a_model_that_passes_the_function_by_is_seen() -> None:
    # its own attention gets a mask that hides everything, which no sample could be right under
    ids, lengths = torch.randint(3, 97, (1, 9)), (4, 5)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        right = build("llama", attention.NAME)(input_ids=ids, **packed_inputs(positions, lengths))
        wrong = build("llama", "sdpa")(input_ids=ids, **packed_inputs(positions, lengths))
    difference = (wrong.logits - right.logits).abs().max()
    assert torch.isnan(difference) or difference > 0.1


CHUNKED = {"head_dim": 16, "num_local_experts": 2, "intermediate_size_mlp": 64}
HYBRID = {"num_experts": 2, "head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}


@pytest.mark.parametrize(
    ("family", "settings", "packs"),
    [
        ("llama", {}, True),
        ("qwen2", {}, True),
        ("qwen3", {}, True),
        ("mistral", {"sliding_window": 4}, True),
        ("gemma3_text", {"head_dim": 16, "sliding_window": 4}, True),
        ("phi", {}, True),
        ("gpt_neox", {}, True),
        # soft caps, sinks: not what SDPA computes
        ("gemma2", {"head_dim": 16}, False),
        ("gpt_oss", {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1}, False),
        # chunks, recurrence, convolutions
        ("llama4_text", CHUNKED, False),
        ("qwen3_next", HYBRID, False),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, False),
        ("mamba", {"state_size": 4}, False),
        # attention classes of their own
        ("bloom", {}, False),
        ("falcon", {}, False),
        ("gptj", {"n_embd": 64, "n_layer": 1, "n_head": 4, "rotary_dim": 8}, False),
    ],
)  # fmt: skip
def test_which_models_pack(family: str, settings: dict[str, Any], packs: bool) -> None:
    with torch.device("meta"):
        config = CONFIG_MAPPING[family](**{**SMALL, **settings})
        model = AutoModelForCausalLM.from_config(config)
    before = model.config._attn_implementation
    use_packed(model)
    assert model.config._attn_implementation == (attention.NAME if packs else before)


def test_registering_twice() -> None:
    attention.register()
    attention.register()
