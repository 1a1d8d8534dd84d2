"""The integers of a layer decode to its weights, and what containers cannot say is refused."""

from typing import Any

import pytest
import torch

from qtune.errors import UserError
from qtune.export.folder.int_weight import int_weight
from qtune.quant.linear import QuantLinear
from qtune.quant.storage import Storage

ALL = ("int4", "int4_sym", "int8")


def layer(storage: Storage, inputs: int = 128, outputs: int = 32) -> QuantLinear:
    torch.manual_seed(0)
    dense = torch.nn.Linear(inputs, outputs, bias=False)
    # rows that lie to one side give scales of either sign and zero points at the ends
    dense.weight.data += torch.linspace(-0.2, 0.2, outputs).unsqueeze(1)
    return QuantLinear.from_linear(dense, storage)


@pytest.mark.parametrize("group_size", [32, 64, "row"])
@pytest.mark.parametrize("format", ALL)
def test_integers_decode_to_the_weights(format: str, group_size: Any) -> None:
    found = layer(Storage(format, group_size))
    weight = int_weight("p", found, ALL)
    size = weight.group_size
    assert size == (128 if group_size == "row" else group_size)
    codes, zeros = weight.codes.unflatten(1, (-1, size)).int(), weight.zeros.int().unsqueeze(-1)
    decoded = (codes - zeros) * weight.scales.unsqueeze(-1)
    assert torch.equal(decoded.flatten(1), found.dequantize(torch.float32))
    assert torch.equal(weight.scales, weight.scales.half().float())
    assert weight.bits == found.format.bits
    if format == "int4":
        assert weight.zeros.min() == 0 and weight.zeros.max() == 15, "both ends are to be tried"
    if format == "int4_sym":
        assert (weight.scales < 0).any() and (weight.scales > 0).any()


def test_trained_float16_scales_are_taken() -> None:
    found = layer(Storage("int4", 64, scales="half"))
    assert torch.equal(int_weight("p", found, ALL).scales.view(-1), found.quant_weight.scales.codes)


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        (Storage("nf4"), "a.b: it is nf4 and the export holds int4 or int4_sym or int8"),
        (Storage("int4", rotated=True), "a.b: its inputs are rotated; set quant.rotate: false"),
        (Storage("int4", channels=True), "set quant.method: gptq"),
        (Storage("int4", zeros="half"), "a.b: its zero points were trained"),
        (Storage("int4", 64, scales="float"), "a.b: its scales are no float16 numbers"),
        (Storage("int4", 256), "a.b: groups of 256 do not divide its 128 inputs"),
    ],
)
def test_what_no_container_holds_is_refused(storage: Storage, message: str) -> None:
    with pytest.raises(UserError, match=message):
        int_weight("a.b", layer(storage), ALL)


def test_sizes_that_fill_no_words_are_refused() -> None:
    with pytest.raises(UserError, match="words hold 8 codes, which do not divide 33 outputs"):
        int_weight("p", layer(Storage("int4"), outputs=33), ALL)
