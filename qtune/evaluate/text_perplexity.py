"""How well a model predicts a text as such, in units that do not depend on its tokenizer.

A loss per token says nothing across tokenizers: one with longer tokens has fewer of them, each
harder to predict. So the surprise of all tokens is summed up and divided by what the text itself
has: bytes and words. Every token of the text counts exactly once, the first one too: it follows the
tokenizer's start token, or its end token where there is none (as the lm-eval harness does).

The text is read in windows of `context` tokens, each `stride` tokens further. Of a window only the
tokens count that no earlier one held, so with a stride below the context every token but the first
ones has seen at least context - stride tokens before it; at stride = context windows do not
overlap, which is fastest and rates the model somewhat lower.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from qtune.errors import UserError
from qtune.evaluate.mode import measuring
from qtune.model.forward import inner_model

# tokens at a time whose logits become float32: a few hundred MiB at the vocabularies in use
ROWS = 512


@dataclass(frozen=True, kw_only=True)
class TextLikelihood:
    """The surprise of a text, in all and by its units; a word is what white space parts."""

    file: str
    nats: float
    tokens: int
    words: int
    bytes: int
    context: int
    stride: int

    @property
    def bits_per_byte(self) -> float:
        """Bits that the model needs for a byte of the text's UTF-8."""
        return self.nats / math.log(2) / self.bytes

    @property
    def perplexity(self) -> float:
        """Per token; not to be compared between tokenizers."""
        return _exp(self.nats / self.tokens)

    @property
    def word_perplexity(self) -> float:
        """Per word."""
        return _exp(self.nats / self.words)


def read_text(path: Path) -> str:
    """The text of a file. UserError: it is missing, no UTF-8, or has no word."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"evaluate.perplexity: {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"evaluate.perplexity: {path} is not UTF-8 ({error.reason} at byte {error.start}); "
            "convert it, for example with iconv"
        ) from error
    if not text.split():
        raise UserError(f"evaluate.perplexity: {path} holds no text")
    return text


def text_likelihood(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    file: str,
    context: int,
    stride: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> TextLikelihood:
    """The likelihood of a text; `on_progress(tokens)` is called with what a window adds.

    A context longer than the model's positions is cut to them, and a stride to the context.
    """
    inner = inner_model(model)
    most = getattr(inner.config.get_text_config(), "max_position_embeddings", None) or context
    context = min(context, most)
    stride = min(stride or context, context)
    ids = torch.tensor(_ids(tokenizer, text))
    nats = 0.0
    with measuring(model):
        for row, targets in windows(ids, context, stride):
            logits = model(input_ids=row.unsqueeze(0).to(inner.device)).logits[0]
            nats += _nats(logits[-len(targets) :], targets)
            if on_progress is not None:
                on_progress(len(targets))
    return TextLikelihood(
        file=file,
        nats=nats,
        tokens=len(ids) - 1,
        words=len(text.split()),
        bytes=len(text.encode()),
        context=context,
        stride=stride,
    )


def windows(ids: Tensor, context: int, stride: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens [L] that are read, L at most `context`, and targets [n] of the last n of them.

    All targets together are the ids [T] but the first, each once and in order.
    """
    done = 0
    while done < len(ids) - 1:
        end = min(len(ids) - 1, done + (stride if done else context))
        yield ids[max(0, end - context) : end], ids[done + 1 : end + 1]
        done = end


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Sequence[int]:
    """The text's tokens behind one that stands for its start. UserError: the tokenizer has none."""
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise UserError(
            "evaluate.perplexity: the tokenizer has neither a start nor an end token, behind which "
            "the first token of a text could be predicted; leave evaluate.perplexity out"
        )
    # a long text is no mistake here, though the tokenizer warns of it
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [first, *ids]


def _nats(logits: Tensor, targets: Tensor) -> float:
    """The sum of cross entropies of targets [n] under logits [n, V], in float64."""
    parts = zip(logits.split(ROWS), targets.to(logits.device).split(ROWS), strict=True)
    losses = [cross_entropy(part.float(), found, reduction="none") for part, found in parts]
    return torch.cat(losses).sum(dtype=torch.float64).item()


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
