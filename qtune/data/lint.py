"""What looks wrong with the samples before training starts, each finding with its row.

Fatal findings would spoil the run without showing in the loss: nothing to learn, a doubled BOS, an
end of turn that is never learned (the model would not stop). The others are for the user to judge.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from statistics import quantiles
from typing import TYPE_CHECKING

from qtune.data.chat import Sample, special_tokens
from qtune.data.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


@dataclass(frozen=True)
class Finding:
    """A problem of one row; a fatal one must stop the run."""

    row: Row
    problem: str
    fatal: bool

    def __str__(self) -> str:
        return f"{self.row.place}: {self.problem}"


def lint(samples: Sequence[Sample], tokenizer: "Tokenizer") -> list[Finding]:
    """Findings about single samples, repeated rows and cut rows, in row order within each kind."""
    special = set(special_tokens(tokenizer))
    adds_bos = _adds_bos(tokenizer)
    found = []
    for sample in samples:
        found += _mask_findings(sample, special, tokenizer)
        found += _bos_findings(sample, tokenizer.bos_token_id, adds_bos)
        found += _empty_turns(sample)
    return found + _repeated(samples) + _cut(samples)


def overlap(train: Sequence[Sample], held_out: Sequence[Sample]) -> list[Finding]:
    """Held-out rows that training also sees: the whole conversation, or its prompt."""
    whole = {_conversation(s.row): s.row for s in reversed(train)}
    prompts = {_conversation(s.row)[:-1]: s.row for s in reversed(train)}
    found = []
    for sample in held_out:
        key = _conversation(sample.row)
        if key in whole:
            problem = f"held out, but also a training row ({whole[key].place})"
        elif key[:-1] in prompts:
            problem = f"held out, but training has its prompt ({prompts[key[:-1]].place})"
        else:
            continue
        found.append(Finding(sample.row, problem, fatal=False))
    return found


def summary(samples: Sequence[Sample]) -> dict[str, float]:
    """Rows, tokens, supervised tokens and their share, cut rows, and percentiles of the lengths."""
    lengths = sorted(len(sample.ids) for sample in samples)
    tokens = sum(lengths)
    supervised = sum(sum(sample.supervised) for sample in samples)
    # One sample has no quantiles, but all of them are its length.
    percentiles = quantiles(
        lengths * 2 if len(lengths) == 1 else lengths, n=100, method="inclusive"
    )
    return {
        "rows": len(samples),
        "tokens": tokens,
        "supervised_tokens": supervised,
        "supervised_share": supervised / tokens,
        "cut_rows": sum(sample.num_cut > 0 for sample in samples),
        "length_min": lengths[0],
        "length_p50": percentiles[49],
        "length_p90": percentiles[89],
        "length_p99": percentiles[98],
        "length_max": lengths[-1],
    }


def _mask_findings(sample: Sample, special: set[int], tokenizer: "Tokenizer") -> list[Finding]:
    trained = [i for i, learned in enumerate(sample.supervised) if learned]
    if not trained:
        cut = f" ({sample.num_cut} tokens were cut)" if sample.num_cut else ""
        return [Finding(sample.row, f"no token would be learned{cut}", fatal=True)]
    # A cut sample has lost its end, which was announced when cutting was asked for.
    if sample.num_cut or _ends_turn(sample, trained, special, tokenizer):
        return []
    last = tokenizer.decode([sample.ids[trained[-1]]])
    problem = f"the end of the turn would not be learned (the last target is {last!r})"
    return [Finding(sample.row, problem, fatal=True)]


def _ends_turn(
    sample: Sample, trained: Sequence[int], special: set[int], tokenizer: "Tokenizer"
) -> bool:
    """Whether the last target, white space aside, is a special token."""
    for i in reversed(trained):
        if sample.ids[i] in special:
            return True
        if str(tokenizer.decode([sample.ids[i]])).strip():
            return False
    return False


def _adds_bos(tokenizer: "Tokenizer") -> bool:
    """Whether the model expects a BOS, going by what its tokenizer does to plain text."""
    ids = tokenizer("a").input_ids
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def _bos_findings(sample: Sample, bos: int | None, adds_bos: bool) -> list[Finding]:
    count = sum(1 for _ in takewhile(lambda token: token == bos, sample.ids))
    if count > 1:
        return [Finding(sample.row, f"begins with {count} BOS tokens", fatal=True)]
    if adds_bos and count == 0:
        problem = "has no BOS token, which the tokenizer puts before plain text"
        return [Finding(sample.row, problem, fatal=False)]
    return []


def _empty_turns(sample: Sample) -> list[Finding]:
    return [
        Finding(sample.row, f"message {i} ({message['role']}) is empty", fatal=False)
        for i, message in enumerate(sample.row.messages, start=1)
        if not message["content"].strip()
    ]


def _repeated(samples: Sequence[Sample]) -> list[Finding]:
    seen: dict[tuple[tuple[str, str], ...], Row] = {}
    found = []
    for sample in samples:
        first = seen.setdefault(_conversation(sample.row), sample.row)
        if first is not sample.row:
            found.append(Finding(sample.row, f"the same as {first.place}", fatal=False))
    return found


def _cut(samples: Sequence[Sample]) -> list[Finding]:
    """One finding for all cut rows, at the first of them."""
    cut = [sample for sample in samples if sample.num_cut]
    if not cut:
        return []
    share = len(cut) / len(samples)
    problem = f"cut at data.max_length, as {len(cut)} of {len(samples)} rows are ({share:.0%})"
    return [Finding(cut[0].row, problem, fatal=False)]


def _conversation(row: Row) -> tuple[tuple[str, str], ...]:
    return tuple((message["role"], message["content"]) for message in row.messages)
