"""Processors without an instruction for bf16 get kernels that need nothing from outside."""

import pytest
import torch

from qtune_kernels.cpu import jit, processor
from qtune_kernels.cpu.jit import KernelCode, Pointer, available, kernel
from qtune_kernels.cpu.norm import _rms_norm
from qtune_kernels.cpu.simd import BF16, F32, LANES
from qtune_kernels.cpu.softmax_gradient import _softmax_gradient

pytestmark = pytest.mark.skipif(not available(), reason="no kernels for this processor")


@kernel
def _round(code: KernelCode, out: Pointer, x: Pointer) -> None:
    vector = code.read(x, F32)
    code.write(vector, out, BF16)
    code.store(vector[0].to(BF16), out + 2 * LANES)


def test_rounding_by_arithmetic_is_that_of_torch(monkeypatch) -> None:
    monkeypatch.setattr(processor, "rounds_to_bf16", lambda: False)
    assert "fptrunc" not in _round.text()
    bits = [0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0xBF818000, 0x7F800000, 0xFF800000]
    bits += [
        0x7F7FFFFF,
        0x7FC00001,
        0x7F800001,
        0xFFFFFFFF,
        0,
        0x80000000,
        1,
        0x00018000,
        0x42F6E979,
    ]
    x = torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)
    out = torch.empty(LANES + 1, dtype=torch.bfloat16)
    _round(out.data_ptr(), x.data_ptr())
    truth = x.bfloat16()
    number = ~truth.isnan()
    assert torch.equal(out[:LANES].isnan(), ~number)
    assert torch.equal(out[:LANES].view(torch.int16)[number], truth.view(torch.int16)[number])
    assert out[LANES] == truth[0]


@pytest.mark.parametrize("name", ["norm", "softmax"])
def test_nothing_is_called_that_llvm_would_have_to_link(monkeypatch, name) -> None:
    monkeypatch.setattr(processor, "rounds_to_bf16", lambda: False)
    if name == "softmax":
        text = _softmax_gradient.text(with_gradient=True)
    else:
        text = _rms_norm.text(width=70, dtype="bf16", rounds=True)
    found = jit.assembly(text, "skylake-avx512")
    # but the number of the thread
    assert found.count("call") == 1
