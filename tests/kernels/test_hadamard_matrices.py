"""Hadamard matrices: orthogonal, of the expected orders, and the same for ever."""

import hashlib
import math

import pytest
import torch

from qtune_kernels.hadamard_matrices import kronecker, orders, paley, signs

# widths of real models: SmolLM2, Qwen2.5, Llama 2 and 3, Gemma 2, Qwen3
WIDTHS = {
    576: (12, 12, 4),
    192: (12, 16),
    1536: (12, 128),
    896: (28, 32),
    4864: (76, 64),
    8960: (20, 28, 16),
    18944: (148, 128),
    11008: (344, 32),
    14336: (28, 512),
    28672: (28, 1024),
    3584: (28, 128),
    5120: (20, 256),
    13824: (12, 12, 12, 8),
    53248: (52, 1024),
    4096: (4096,),
    9216: (12, 12, 64),
    29568: (12, 28, 44, 2),
    17408: (68, 256),
}


@pytest.mark.parametrize("width", WIDTHS)
def test_widths_of_real_models_are_covered_by_one_block(width) -> None:
    num_blocks, factors = orders(width)
    dense = [order for order in factors if order > 2]
    twos = width // math.prod(dense)
    assert num_blocks == 1 and math.prod(factors) == width
    assert tuple(dense + [twos] * (twos > 1)) == WIDTHS[width]


@pytest.mark.parametrize(
    ("width", "num_blocks"), [(13696, 107), (7, 7), (1, 1), (206, 103), (92 * 8, 23)]
)
def test_other_widths_have_blocks_of_a_power_of_two(width, num_blocks) -> None:
    found = orders(width)
    assert found.num_blocks == num_blocks
    assert math.prod(found.factors) == width // num_blocks and set(found.factors) <= {2}


# fields of primes and of their squares and cubes, both constructions
@pytest.mark.parametrize("order", [12, 20, 28, 36, 52, 60, 76, 84, 100, 104, 140, 148, 244, 344])
def test_paley_matrices_are_hadamard_matrices(order) -> None:
    made = paley(order)
    assert torch.equal(made.abs(), torch.ones_like(made))
    assert torch.equal(made @ made.T, order * torch.eye(order, dtype=torch.long))


def test_products_are_those_of_kronecker_outermost_first() -> None:
    expected = torch.kron(paley(12), torch.tensor([[1, 1], [1, -1]]))
    assert torch.equal(kronecker((12, 2)), expected)
    parities = [[(-1) ** (i & j).bit_count() for j in range(8)] for i in range(8)]
    assert kronecker((2, 2, 2)).tolist() == parities


def test_signs_look_random_and_depend_on_the_seed() -> None:
    first, second = signs(1 << 16), signs(1 << 16, 1)
    assert torch.equal(first.abs(), torch.ones(1 << 16))
    for one in (first, second, first * second, first[1:] * first[:-1]):
        assert abs(float(one.sum())) < 4 * 256


def test_what_stored_weights_depend_on_never_changes() -> None:
    digest = hashlib.sha256()
    for width in (576, 11008, 53248, 4864):
        for seed in (0, 1):
            digest.update(signs(width, seed).to(torch.int8).numpy().tobytes())
        for order in orders(width).factors:
            digest.update(kronecker((order,)).to(torch.int8).numpy().tobytes())
    assert digest.hexdigest()[:16] == "4396f0b6bf178b90"


def test_the_device_and_dtype_of_whoever_asks_do_not_matter() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            made, random = kronecker((36, 2)), signs(5)
    finally:
        torch.set_default_dtype(torch.float32)
    assert made.device.type == random.device.type == "cpu"
    assert (made.dtype, random.dtype) == (torch.long, torch.float32)
