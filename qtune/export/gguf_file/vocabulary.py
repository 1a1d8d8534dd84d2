"""The tokens of a tokenizer as a GGUF file lists them: texts, types, merges or scores.

Two kinds are known: byte-level pairs (GPT-2, Llama 3, Qwen) with their merges, and SentencePiece
(Llama 2, Mistral, Gemma), which llama.cpp merges by scores. transformers keeps the latter as merges
in order of these scores, so their place in the list serves as the score, exactly.
"""

from dataclasses import dataclass
from typing import Any

from qtune.errors import UserError
from qtune.export.gguf_file.splitting import parts, splitting_name

# ggml's numbers for types of tokens
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BLANK = "\N{LOWER ONE EIGHTH BLOCK}"
# of tokens that come of no merge: llama.cpp joins neighbours to any token that it knows
_NEVER = -1e9


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of tokens; `scores` or `merges` is None, as the kind has it."""

    kind: str
    splitting: str
    texts: list[str]
    types: list[int]
    merges: list[str] | None = None
    scores: list[float] | None = None
    blank_in_front: bool | None = None


def vocabulary(backend: dict[str, Any], size: int, *, chats: bool = False) -> Vocabulary:
    """The vocabulary of a tokenizer.json, filled up to `size`; UserError for an unknown kind.

    With `chats` texts begin with a special token, as chat templates make them.
    """
    model = backend["model"]
    pieces = parts(backend["pre_tokenizer"], "pretokenizers")
    if model["type"] == "BPE" and any(piece["type"] == "ByteLevel" for piece in pieces):
        return _byte_level(backend, size)
    if model["type"] == "BPE" and model.get("byte_fallback"):
        return _sentencepiece(backend, size, chats)
    raise UserError(
        f"qtune writes byte-level and SentencePiece BPE tokenizers to GGUF files, and this one is "
        f"of the type {model['type']}; export bf16"
    )


def _byte_level(backend: dict[str, Any], size: int) -> Vocabulary:
    texts, types = _tokens(backend, size)
    merges = [" ".join(pair) for pair in _pairs(backend)]
    if not merges:
        raise UserError(
            "this tokenizer merges nothing, and llama.cpp has no such byte-level tokenizers; "
            "export bf16"
        )
    return Vocabulary("gpt2", splitting_name(backend), texts, types, merges=merges)


def _sentencepiece(backend: dict[str, Any], size: int, chats: bool) -> Vocabulary:
    texts, types = _tokens(backend, size)
    unknown = backend["model"].get("unk_token")
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(_pairs(backend)):
        ranks.setdefault("".join(pair), rank)
    for number, text in enumerate(texts):
        if types[number] == NORMAL and len(text) == 6 and text.startswith("<0x"):
            types[number] = BYTE
        elif text == unknown:
            types[number] = UNKNOWN
        elif types[number] == USER_DEFINED:
            # llama.cpp looks for these in text as it was typed
            texts[number] = text.replace(BLANK, " ")
    scores = [-float(ranks[text]) if text in ranks else _NEVER for text in texts]
    in_front = _blank_in_front(backend, chats)
    return Vocabulary("llama", "default", texts, types, scores=scores, blank_in_front=in_front)


def _tokens(backend: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Texts and types by id; ids that the tokenizer does not use get a text of their own."""
    texts, types = [f"[PAD{number}]" for number in range(size)], [UNUSED] * size
    added = backend["added_tokens"]
    names = backend["model"]["vocab"] | {token["content"]: token["id"] for token in added}
    if max(names.values()) >= size:
        raise UserError(
            f"the tokenizer has the id {max(names.values())} and the model only {size} embeddings; "
            "resize the model's embeddings"
        )
    for text, number in names.items():
        texts[number], types[number] = text, NORMAL
    for token in added:
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    return texts, types


def _pairs(backend: dict[str, Any]) -> list[tuple[str, str]]:
    """The merges; older files have each as one text."""
    merges = backend["model"]["merges"]
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges)
    return [(left, right) for left, right in pairs]


def _blank_in_front(backend: dict[str, Any], chats: bool) -> bool:
    """Whether a blank is put before a text.

    llama.cpp puts one behind special tokens too, or nowhere. Tokenizers that have it at the very
    beginning only never put one into a text that begins with a special token.
    """
    schemes = ("always",) if chats else ("always", "first")
    normalizers = parts(backend["normalizer"], "normalizers")
    pieces = parts(backend["pre_tokenizer"], "pretokenizers")
    return any(step["type"] == "Prepend" for step in normalizers) or any(
        piece["type"] == "Metaspace" and piece["prepend_scheme"] in schemes for piece in pieces
    )
