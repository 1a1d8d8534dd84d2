"""Rows that come twice: within the training data, or both in it and in what is held out.

Rows are compared by hashes of their messages, so no text has to be kept: eight bytes a row for the
whole conversation, eight for its prompt, that is all messages but the last.
"""

import hashlib
import json
from collections.abc import Callable, Sequence

import numpy as np

from qtune.data.chunk import Hashes, Ints, Keys
from qtune.data.findings import MOST_KEPT, Finding, Findings, Kind
from qtune.data.rows import Message, Row
from qtune.data.store import Samples

# what does not change what the model reads
_ASIDE = "weight"


def row_hashes(row: Row) -> Hashes:
    """Hashes of the row as a whole and of its prompt; 0 for a prompt without a message."""
    prompt = row.messages[:-1]
    whole = _hash(row.messages, row.rejected, row.label)
    return Hashes(whole, _hash(prompt, None, None) if prompt else 0)


def repeated(samples: Samples) -> Findings:
    """Rows that have come before."""
    hashes = samples.whole
    begins = np.flatnonzero(hashes)
    # stable, so that of equal rows the first in the data comes first
    ranked = begins[np.argsort(hashes[begins], kind="stable")]
    same = hashes[ranked[1:]] == hashes[ranked[:-1]]
    # where a run of equal rows begins, for each place of the ranking
    starts = np.maximum.accumulate(np.where(np.r_[True, ~same], np.arange(len(ranked)), 0))
    later, first = ranked[1:][same], ranked[starts[1:][same]]
    kept = [
        Finding(samples[i].place, f"the same as {samples[j].place}", False, "repeated")
        for i, j in sorted(zip(later.tolist(), first.tolist(), strict=True))[:MOST_KEPT]
    ]
    return Findings({"repeated": len(later)} if len(later) else {}, kept)


def overlap(train: Samples, whole: Keys, prompt: Keys, place: Callable[[int], str]) -> Findings:
    """Rows held out that training sees too, or whose prompt it sees.

    `whole` and `prompt` are the hashes of rows held out, `place` tells where one of them was read.
    """
    in_whole, in_prompt = _where(whole, train.whole), _where(prompt, train.prompt)
    in_prompt[in_whole >= 0] = -1
    found = Findings()
    kinds: list[tuple[Ints, str, Kind]] = [
        (in_whole, "also a training row", "held out and trained on"),
        (in_prompt, "training has its prompt", "prompt trained on"),
    ]
    for rows, words, kind in kinds:
        at = np.flatnonzero(rows >= 0)
        kept = [
            Finding(place(i), f"held out, but {words} ({train[int(rows[i])].place})", False, kind)
            for i in at[:MOST_KEPT].tolist()
        ]
        found.merge(Findings({kind: len(at)} if len(at) else {}, kept))
    return found


def _where(wanted: Keys, hashes: Keys) -> Ints:
    """Index of the first of `hashes` that equals each wanted one; -1: none, or the hash is 0."""
    values, first = np.unique(hashes, return_index=True)
    at = np.searchsorted(values, wanted).clip(max=len(values) - 1)
    return np.where((values[at] == wanted) & (wanted != 0), first[at], -1)


def _hash(
    messages: Sequence[Message], rejected: Sequence[Message] | None, label: bool | None
) -> int:
    """A number from 1 to 2^64 - 1 that tells conversations apart."""
    told = [
        [{key: value for key, value in message.items() if key != _ASIDE} for message in several]
        for several in (messages, rejected or ())
    ]
    text = json.dumps([*told, label], sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) or 1
