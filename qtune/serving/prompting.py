"""Tokenizer and chat template of an exported folder against qtune.json and its golden prompts."""

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from qtune.data.spans import RenderError
from qtune.data.template import renderer
from qtune.data.tokens import tokenise
from qtune.export.folder import fingerprint, template
from qtune.serving.difference import Difference, length_in_common, values

_AROUND = 20


def differences(
    tokenizer: PreTrainedTokenizerBase, manifest: dict[str, Any]
) -> Iterator[Difference]:
    """What of tokens, template and golden prompts is not as it was."""
    yield from _tokens(fingerprint.tokens(tokenizer), manifest["tokenizer"])
    now = template.facts(tokenizer)["template_sha256"]
    if now != manifest["template_sha256"]:
        yield Difference("chat template", _hashes(now, manifest["template_sha256"]))
    for number, golden in enumerate(manifest["golden"], start=1):
        yield from _prompt(tokenizer, golden, f"golden prompt {number}")


def _tokens(now: dict[str, Any], was: dict[str, Any]) -> Iterator[Difference]:
    if now["size"] != was["size"]:
        yield Difference("tokenizer", f"it has {now['size']} tokens, and had {was['size']}")
    added = list(values("added tokens", was["added"], now["added"]))
    yield from added
    if now["sums"] == was["sums"] or added:
        return
    token = fingerprint.changed_token(was, now)
    which = "several tokens are other ones" if token is None else f"token {token} is another one"
    yield Difference("tokenizer", which)


def _prompt(
    tokenizer: PreTrainedTokenizerBase, golden: dict[str, Any], name: str
) -> Iterator[Difference]:
    """Whether the prompt's messages are rendered, and its text is tokenised, as they were."""
    text = golden["text"]
    if golden["messages"] is not None and tokenizer.chat_template:
        try:
            now = renderer(tokenizer, golden["tools"])(
                golden["messages"], add_generation_prompt=True
            )
        except RenderError as error:
            yield Difference(name, f"the chat template refuses it: {error}")
            return
        if now != text:
            yield Difference(name, f"is rendered {_first_change(text, now)}")
    if text is not None:
        yield from _ids(tokenizer, golden, text, name)


def _ids(
    tokenizer: PreTrainedTokenizerBase, golden: dict[str, Any], text: str, name: str
) -> Iterator[Difference]:
    now, was = tokenise(tokenizer, text)[0], golden["prompt_ids"]
    if now == was:
        return
    at = length_in_common(now, was)
    if at == min(len(now), len(was)):
        yield Difference(name, f"has {len(now)} tokens, and had {len(was)}")
    else:
        yield Difference(name, f"token {at + 1} has the id {now[at]}, and had {was[at]}")


def _first_change(was: str, now: str) -> str:
    """The place where two texts part, with what follows in both."""
    at = length_in_common(was, now)
    there, here = was[at : at + _AROUND], now[at : at + _AROUND]
    return f"otherwise from character {at + 1}: {here!r}, and was {there!r}"


def _hashes(now: str | None, was: str | None) -> str:
    shown = ["none" if value is None else value[:16] for value in (now, was)]
    return f"its SHA-256 is {shown[0]}, and was {shown[1]}"
