"""Which type each tensor of a GGUF file is stored in: llama.cpp's mixes, as its users know them.

The letters at the end of a name (M: medium) say how many of the matrices that tell most take more
bits than the rest: values and the way down out of the feed-forward, in the first and last eighth of
the blocks and every third between. Norms and biases stay in float32. Rows that are no whole blocks
of a type take what llama.cpp falls back to.
"""

from dataclasses import dataclass, field

from qtune.quant.kquants.encoder import fitting_kind

# llama.cpp reads the head of these in any type, and a bad one costs every token
HEADS = ("output.weight", "token_embd.weight")
# query heads per key head from which on a matrix of values is small for what hangs on it
_MANY_HEADS = 4


@dataclass(frozen=True)
class Mix:
    """The type of most matrices, of the head, and of matrices that differ, by their role.

    `all` are those of every block, `most_telling` those of the blocks that are worth more bits,
    `first` those of the first part of the blocks.
    """

    rest: str
    head: str
    file_type: int
    """llama.cpp's number for the mix, LLAMA_FTYPE."""
    all: dict[str, str] = field(default_factory=dict)
    most_telling: dict[str, str] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    many_heads: dict[str, str] = field(default_factory=dict)


MIXES = {
    "f16": Mix("F16", "F16", 1),
    "q8_0": Mix("Q8_0", "Q8_0", 7),
    "q6_k": Mix("Q6_K", "Q6_K", 18),
    "q5_k_m": Mix(
        "Q5_K", "Q6_K", 17, {"attn_qkv": "Q6_K"}, {"attn_v": "Q6_K", "ffn_down": "Q6_K"}
    ),
    "q4_k_m": Mix(
        "Q4_K", "Q6_K", 15, {"attn_qkv": "Q5_K"}, {"attn_v": "Q6_K", "ffn_down": "Q6_K"}
    ),
    "q3_k_m": Mix(
        "Q3_K", "Q6_K", 12,
        {"attn_v": "Q4_K", "attn_qkv": "Q4_K", "attn_output": "Q4_K", "ffn_down": "Q4_K"},
        first={"attn_v": "Q5_K", "ffn_down": "Q5_K"},
    ),
    "q2_k": Mix(
        "Q2_K", "Q6_K", 10, {"attn_v": "Q3_K", "attn_output": "Q3_K", "ffn_down": "Q3_K"},
        many_heads={"attn_v": "Q4_K"},
    ),
    "q4_0": Mix("Q4_0", "Q6_K", 2),
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """What of a model the choice depends on."""

    num_blocks: int
    heads_per_key: int
    """Query heads that share a key head."""
    tied: bool
    """Whether the embeddings are the head, too."""


def kind_of(name: str, shape: tuple[int, ...], mix: Mix, model: Shape) -> str:
    """The type of the tensor called `name` in the file, of that shape (rows first)."""
    if len(shape) == 1:
        return "F32"
    head = HEADS[1] if model.tied else HEADS[0]
    wanted = mix.head if name == head else _in_block(name, mix, model)
    return fitting_kind(wanted, shape[-1])


def _in_block(name: str, mix: Mix, model: Shape) -> str:
    if not name.startswith("blk."):
        return mix.rest
    _, number, role, _ = name.split(".")
    block = int(number)
    kind = mix.all.get(role, mix.rest)
    if role in mix.many_heads and model.heads_per_key >= _MANY_HEADS:
        kind = mix.many_heads[role]
    if role in mix.most_telling and _tells_most(block, model.num_blocks):
        kind = mix.most_telling[role]
    if role in mix.first and block < _num_first(role, model.num_blocks):
        kind = mix.first[role]
    return kind


def _tells_most(block: int, num_blocks: int) -> bool:
    eighth = num_blocks // 8
    return block < eighth or block >= 7 * num_blocks // 8 or (block - eighth) % 3 == 2


def _num_first(role: str, num_blocks: int) -> int:
    return 2 if role == "attn_v" else num_blocks // 16
