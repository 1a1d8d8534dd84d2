"""What looks wrong with a row's samples before training starts.

Fatal findings would spoil the run without showing in the loss: nothing to learn, a doubled BOS, an
end of turn that is never learned (the model would not stop). The others are for the user to judge.
Rows are looked at one by one, as they are tokenised; what only shows among all of them, repeated
rows and held-out rows that are trained on, is found by their hashes (`repeats.py`).
"""

from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

from qtune.data.findings import Finding
from qtune.data.rows import Row
from qtune.data.sample import Sample
from qtune.data.tokens import special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


class Lint:
    """Looks at rows with one tokenizer."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self._tokenizer = tokenizer
        self._special = set(special_tokens(tokenizer))
        self._bos = tokenizer.bos_token_id
        # whether the model expects a BOS, going by what its tokenizer does to plain text
        self._adds_bos = self._bos is not None and tokenizer("a").input_ids[:1] == [self._bos]

    def findings(self, row: Row, samples: Sequence[Sample]) -> Iterator[Finding]:
        """What is odd about a row and the samples it became."""
        yield from _empty_turns(row)
        if not samples:
            problem = "left out: longer than data.max_length"
            yield Finding(row.place, problem, False, "left out")
        for number, sample in enumerate(samples):
            for part in sample.parts:
                yield from self._bos_findings(part, first=number == 0)
                yield from self._mask_findings(part, last=number == len(samples) - 1)

    def _bos_findings(self, part: Sample, first: bool) -> Iterator[Finding]:
        count = sum(1 for _ in takewhile(lambda token: token == self._bos, part.ids))
        if count > 1:
            yield Finding(part.place, f"begins with {count} BOS tokens", True, "several BOS")
        if self._adds_bos and count == 0 and first:
            problem = "has no BOS token, which the tokenizer puts before plain text"
            yield Finding(part.place, problem, False, "no BOS")

    def _mask_findings(self, part: Sample, last: bool) -> Iterator[Finding]:
        learned = [i for i, weight in enumerate(part.weights) if weight > 0]
        if not learned:
            yield Finding(part.place, _nothing_learned(part), True, "nothing learned")
        elif part.num_cut:
            problem = f"cut at data.max_length, without its last {part.num_cut} tokens"
            yield Finding(part.place, problem, False, "cut")
        elif last and not self._ends_turn(part, learned):
            token = self._tokenizer.decode([part.ids[learned[-1]]])
            problem = f"the end of the turn would not be learned (the last target is {token!r})"
            yield Finding(part.place, problem, True, "end not learned")

    def _ends_turn(self, part: Sample, learned: Sequence[int]) -> bool:
        """Whether the last target, white space aside, is a special token."""
        for i in reversed(learned):
            if part.ids[i] in self._special:
                return True
            if str(self._tokenizer.decode([part.ids[i]])).strip():
                return False
        return False


def _nothing_learned(part: Sample) -> str:
    if not part.num_cut:
        return "no token would be learned"
    return (
        f"no token would be learned ({part.num_cut} tokens were cut); raise data.max_length, or "
        "leave such rows out with data.overlong: drop"
    )


def _empty_turns(row: Row) -> Iterator[Finding]:
    for i, message in enumerate(row.messages, start=1):
        if not str(message.get("content") or "").strip() and not message.get("tool_calls"):
            problem = f"message {i} ({message['role']}) is empty"
            yield Finding(row.place, problem, False, "empty turn")
