"""Bytes against ggml's encoders: the same sizes, no larger errors; and what is refused."""

from collections.abc import Callable

import gguf
import pytest
import torch
from torch import Tensor

from qtune.errors import UserError
from qtune.quant.kquants import encoder
from qtune.quant.kquants.encoder import KINDS, encode, fitting_kind, row_bytes

FITTED = [kind for kind in KINDS if kind not in encoder.FLOATS]
Encode = Callable[..., Tensor]
Weights = Callable[[str], Tensor]


def error(weight: Tensor, decoded: Tensor, worth: Tensor) -> float:
    return float(((decoded - weight).double().square() * worth.double()).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_are_those_of_the_format(kind: str) -> None:
    sizes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    assert (encoder.block_size(kind), encoder.type_size(kind)) == sizes
    assert encode(torch.randn(3, 512), kind).shape == (3, row_bytes(kind, 512))


@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "weighted"])
@pytest.mark.parametrize("values", ["normal", "heavy", "positive"])
@pytest.mark.parametrize("kind", FITTED)
def test_error_is_no_larger_than_that_of_ggml(
    kind: str,
    values: str,
    weighted: bool,
    weights: Weights,
    importance: Tensor,
    ggml_encode: Encode,
    decode: Encode,
) -> None:
    weight, worth = weights(values), importance if weighted else None
    ours = decode(encode(weight, kind, worth), kind)
    theirs = decode(ggml_encode(weight, kind, worth), kind)
    counted = importance if weighted else torch.ones(512)
    assert error(weight, ours, counted) <= 1.02 * error(weight, theirs, counted)


@pytest.mark.parametrize("kind", FITTED)
def test_important_inputs_have_smaller_errors(
    kind: str, weights: Weights, importance: Tensor, decode: Encode
) -> None:
    weight = weights("normal")
    alike = decode(encode(weight, kind), kind)
    weighted = decode(encode(weight, kind, importance), kind)
    assert error(weight, weighted, importance) < error(weight, alike, importance)


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q4_0", "IQ4_NL"])
def test_what_a_file_held_is_kept(
    kind: str, weights: Weights, ggml_encode: Encode, decode: Encode
) -> None:
    held = decode(ggml_encode(weights("normal"), kind), kind)
    assert torch.equal(decode(encode(held, kind), kind), held)


@pytest.mark.parametrize("kind", FITTED)
def test_slices_make_no_difference(
    kind: str, weights: Weights, decode: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = weights("heavy")[:5]
    whole = decode(encode(weight, kind), kind)
    monkeypatch.setattr(encoder, "SLICE", 1024)
    slices = decode(encode(weight, kind), kind)
    # not bit for bit: sums are rounded in another order, which decides between levels as near
    assert torch.allclose(slices, whole, atol=0.2 * float(weight.abs().max()))
    counted = torch.ones(512)
    assert error(weight, slices, counted) == pytest.approx(error(weight, whole, counted), rel=0.01)


@pytest.mark.parametrize("kind", FITTED)
def test_zeros_stay_zeros_beside_other_weights(kind: str, decode: Encode) -> None:
    weight = torch.zeros(2, 512)
    weight[1] = torch.randn(512)
    assert not decode(encode(weight, kind), kind)[0].any()


@pytest.mark.parametrize("kind", FITTED)
def test_steps_below_16_bit_floats_do_not_lose_the_weights(
    kind: str, weights: Weights, decode: Encode
) -> None:
    weight = weights("normal") * 2.0**-12
    relative = error(weight, decode(encode(weight, kind), kind), torch.ones(512))
    # ggml's own Q6_K gives all of them up here
    assert relative < 0.2 * float(weight.double().square().sum())


@pytest.mark.parametrize("kind", FITTED)
def test_inputs_that_were_never_used_keep_their_weights(
    kind: str, weights: Weights, decode: Encode
) -> None:
    weight = weights("normal")
    for worth in (torch.zeros(512), torch.ones(512).index_fill(0, torch.arange(256), 0)):
        decoded = decode(encode(weight, kind, worth), kind)[:, :256]
        unused = weight[:, :256]
        assert error(unused, decoded, torch.ones(256)) < 0.2 * float(unused.square().sum())


def test_floats_are_rounded_once(decode: Encode) -> None:
    weight = torch.randn(3, 40)
    assert torch.equal(decode(encode(weight, "F32"), "F32"), weight)
    assert torch.equal(decode(encode(weight, "F16"), "F16"), weight.half().float())
    assert torch.equal(decode(encode(weight, "BF16"), "BF16"), weight.bfloat16().float())


def test_weights_may_be_of_any_float_type(weights: Weights) -> None:
    weight = weights("normal").bfloat16()
    assert torch.equal(encode(weight, "Q4_K"), encode(weight.float(), "Q4_K"))


@pytest.mark.parametrize(
    ("kind", "instead"),
    [("Q2_K", "IQ4_NL"), ("Q3_K", "IQ4_NL"), ("Q4_K", "Q5_0"), ("Q5_K", "Q5_1"), ("Q6_K", "Q8_0")],
)
def test_rows_that_are_no_whole_blocks_take_another_kind(kind: str, instead: str) -> None:
    assert fitting_kind(kind, 512) == kind
    assert fitting_kind(kind, 576) == instead
    assert fitting_kind(kind, 40) == "F16"
    with pytest.raises(UserError, match=f"rows of 576 .* of 256, .* {instead} can hold them"):
        encode(torch.ones(2, 576), kind)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -1e6])
def test_numbers_that_no_step_reaches_are_refused(bad: float) -> None:
    weight = torch.ones(2, 256)
    weight[1, 7] = bad
    with pytest.raises(ValueError, match="NaN"):
        encode(weight, "Q4_K")
