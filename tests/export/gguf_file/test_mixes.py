import pytest

from qtune.export.gguf_file.mixes import MIXES, Mix, Shape, kind_of
from qtune.quant.kquants.encoder import row_bytes

# GiB of Llama 3 8B that the help of llama.cpp's llama-quantize gives, tokenizer and norms included
LLAMA3_8B = {
    "q4_0": 4.34, "q2_k": 2.96, "q3_k_m": 3.74, "q4_k_m": 4.58, "q5_k_m": 5.33, "q6_k": 6.14,
    "q8_0": 7.96,
}  # fmt: skip
MATRICES = {
    "attn_q": (4096, 4096), "attn_k": (1024, 4096), "attn_v": (1024, 4096),
    "attn_output": (4096, 4096), "ffn_gate": (14336, 4096), "ffn_up": (14336, 4096),
    "ffn_down": (4096, 14336),
}  # fmt: skip
LLAMA3 = Shape(num_blocks=32, heads_per_key=4, tied=False)


def blocks_of(kind: str, role: str, mix: Mix, shape: Shape) -> list[int]:
    names = [f"blk.{block}.{role}.weight" for block in range(shape.num_blocks)]
    return [i for i, name in enumerate(names) if kind_of(name, (256, 256), mix, shape) == kind]


@pytest.mark.parametrize("name", LLAMA3_8B)
def test_files_are_as_large_as_those_of_llamacpp(name: str) -> None:
    shapes = {
        f"blk.{block}.{role}.weight": shape
        for block in range(32)
        for role, shape in MATRICES.items()
    } | {"token_embd.weight": (128256, 4096), "output.weight": (128256, 4096)}
    size = sum(
        shape[0] * row_bytes(kind_of(tensor, shape, MIXES[name], LLAMA3), shape[1])
        for tensor, shape in shapes.items()
    )
    assert size / 2**30 == pytest.approx(LLAMA3_8B[name], abs=0.015)


def test_blocks_that_tell_most() -> None:
    """The first and last eighth, and every third between."""
    expected = [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    for role in ("attn_v", "ffn_down"):
        assert blocks_of("Q6_K", role, MIXES["q4_k_m"], LLAMA3) == expected
    assert blocks_of("Q6_K", "attn_k", MIXES["q4_k_m"], LLAMA3) == []
    assert blocks_of("Q5_K", "attn_v", MIXES["q3_k_m"], LLAMA3) == [0, 1]


def test_values_of_few_heads_take_more_bits() -> None:
    shape = Shape(num_blocks=8, heads_per_key=1, tied=False)
    assert blocks_of("Q3_K", "attn_v", MIXES["q2_k"], shape) == list(range(8))
    assert blocks_of("Q4_K", "attn_v", MIXES["q2_k"], LLAMA3) == list(range(32))


@pytest.mark.parametrize(
    ("name", "tied", "kind"),
    [
        ("output.weight", False, "Q6_K"),
        ("token_embd.weight", False, "Q4_K"),
        ("token_embd.weight", True, "Q6_K"),
    ],
)
def test_the_head_takes_more_bits(name: str, tied: bool, kind: str) -> None:
    assert kind_of(name, (1000, 512), MIXES["q4_k_m"], Shape(8, 1, tied)) == kind


def test_rows_that_are_no_whole_blocks_and_vectors() -> None:
    shape = Shape(8, 1, tied=True)
    assert kind_of("blk.1.attn_q.weight", (576, 576), MIXES["q4_k_m"], shape) == "Q5_0"
    assert kind_of("token_embd.weight", (900, 576), MIXES["q4_k_m"], shape) == "Q8_0"
    assert kind_of("blk.1.attn_norm.weight", (576,), MIXES["q2_k"], shape) == "F32"
    assert kind_of("blk.1.attn_q.bias", (576,), MIXES["f16"], shape) == "F32"
