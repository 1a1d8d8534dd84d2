"""Parts of sums against their sum in float64."""

import pytest
import torch

kernels = pytest.importorskip("qtune_kernels.partial_sums_triton")


@pytest.mark.parametrize("has_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("parts", [2, 5])
def test_parts_and_the_bias_are_added(parts: int, has_bias: bool, device) -> None:
    # more than one block, and a last one that is not full
    out = torch.full((37, 45), torch.nan, device=device, dtype=torch.bfloat16)
    sums = kernels.partial_sums(out, parts)
    assert sums.shape == (parts, 37, 45) and sums.dtype == torch.float32
    sums.normal_()
    bias = torch.randn(45, device=device).bfloat16() if has_bias else None
    kernels.add_parts(sums, bias, out)
    truth = sums.double().sum(0) + (0 if bias is None else bias.double())
    torch.testing.assert_close(out.double(), truth, rtol=2**-8, atol=1e-5)


def test_one_part_is_the_result(device) -> None:
    out = torch.randn(3, 4, device=device)
    before = out.clone()
    assert kernels.partial_sums(out, 1) is out
    kernels.add_parts(out, None, out)
    assert torch.equal(out, before)
