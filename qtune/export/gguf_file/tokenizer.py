"""The tokenizer, its special tokens and the chat template in a GGUF file's metadata.

What is put around a text is found by encoding one, not read from settings that a tokenizer may
ignore. llama.cpp stops at up to three ids that have names of their own (eos, eot, eom), so all that
end an answer after training are told to it.
"""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from qtune.errors import UserError
from qtune.export.gguf_file.vocabulary import Vocabulary, vocabulary

if TYPE_CHECKING:
    from gguf import GGUFWriter

_PROBE = "a"


def add_tokenizer(
    writer: "GGUFWriter", tokenizer: PreTrainedTokenizerBase, size: int, stops: Sequence[int]
) -> None:
    """Write the tokenizer with `size` tokens, whose ids `stops` end an answer.

    Raises UserError for a tokenizer that llama.cpp has not.
    """
    found = vocabulary_of(tokenizer, size)
    writer.add_tokenizer_model(found.kind)
    writer.add_tokenizer_pre(found.splitting)
    writer.add_token_list(found.texts)
    writer.add_token_types(found.types)
    if found.merges is not None:
        writer.add_token_merges(found.merges)
    if found.scores is not None:
        writer.add_token_scores(found.scores)
    if found.blank_in_front is not None:
        writer.add_add_space_prefix(found.blank_in_front)
    _add_special(writer, tokenizer)
    _add_stops(writer, tokenizer, stops)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """The tokenizer's vocabulary, filled up to `size`; UserError where llama.cpp has no such."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            "this tokenizer is written in Python, and qtune writes those of the tokenizers library "
            "to GGUF files; export bf16"
        )
    return vocabulary(json.loads(backend.to_str()), size, chats=bool(tokenizer.chat_template))


def _add_special(writer: "GGUFWriter", tokenizer: PreTrainedTokenizerBase) -> None:
    front, end = _around(tokenizer)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if front not in ([], [bos]) or end not in ([], [eos]):
        raise UserError(
            f"the tokenizer puts {front} before a text and {end} behind it; llama.cpp puts the "
            f"beginning ({bos}) and the end ({eos}) there and nothing else; export bf16"
        )
    writer.add_add_bos_token(bool(front))
    writer.add_add_eos_token(bool(end))
    for number, add in (
        (bos, writer.add_bos_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if number is not None:
            add(number)


def _add_stops(
    writer: "GGUFWriter", tokenizer: PreTrainedTokenizerBase, stops: Sequence[int]
) -> None:
    adders = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ends = list(dict.fromkeys([*own, *stops]))
    if len(ends) > len(adders):
        raise UserError(
            f"answers end at {len(ends)} tokens ({ends}) and a GGUF file names {len(adders)}; "
            "remove some from eos_token_id in the base's generation_config.json"
        )
    for add, number in zip(adders, ends, strict=False):
        add(number)


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids that are put before and behind a text."""
    plain = tokenizer.encode(_PROBE, add_special_tokens=False)
    whole = tokenizer.encode(_PROBE)
    starts = range(len(whole) - len(plain) + 1)
    at = next(i for i in starts if whole[i : i + len(plain)] == plain)
    return whole[:at], whole[at + len(plain) :]
