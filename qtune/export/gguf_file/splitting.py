"""What llama.cpp calls the rule by which a tokenizer splits text before its merges.

A GGUF file names the rule (`tokenizer.ggml.pre`) and llama.cpp has them built in, so only those
known here can be written: the name is found by comparing the tokenizer's own rule with theirs. An
unknown one is refused, for a wrong name gives other ids without any error. The inverse of
qtune/model/gguf_tokenizer.py, whose names these are.
"""

import json
from dataclasses import dataclass
from typing import Any

from qtune.errors import UserError

# of Llama 3 and Qwen 2, which differ in how many digits make one piece
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Splitting:
    """A rule: what text is cut by in turn (`words`: GPT-2's own), and whether a piece that is a
    token is taken whole.
    """

    steps: tuple[str, ...]
    ignores_merges: bool = False


_NAMES = {
    Splitting(("words",)): "gpt-2",
    Splitting(("digits", "words")): "smollm",
    Splitting((_WORDS % "{1,3}",), ignores_merges=True): "llama-bpe",
    Splitting((_WORDS % "{1,3}",)): "dbrx",
    Splitting((_WORDS % "",)): "qwen2",
}


def splitting_name(backend: dict[str, Any]) -> str:
    """llama.cpp's name for the rule of a byte-level tokenizer, given as its tokenizer.json.

    Raises UserError where it has none that is known here.
    """
    steps = parts(backend["pre_tokenizer"], "pretokenizers")
    cuts = tuple(cut for step in steps if (cut := _cut(step)) is not None)
    found = _NAMES.get(Splitting(cuts, bool(backend["model"].get("ignore_merges"))))
    normalizers = {step["type"] for step in parts(backend["normalizer"], "normalizers")}
    # llama.cpp leaves text as it is; what is typed is in normal form C as a rule
    if found is None or normalizers - {"NFC"}:
        raise UserError(
            "this tokenizer splits text in a way that qtune cannot name for llama.cpp: "
            f"{json.dumps(backend['pre_tokenizer'], ensure_ascii=False)}, normalizers "
            f"{sorted(normalizers)}; known are {', '.join(_NAMES.values())}. Export bf16 and "
            "convert it with llama.cpp's convert_hf_to_gguf.py"
        )
    return found


def parts(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a sequence, or the only step."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [part for inner in step[key] for part in parts(inner, key)]
    return [step]


def _cut(step: dict[str, Any]) -> str | None:
    """What text is cut by, in the words of `Splitting`; None where it is only made bytes."""
    kind = step["type"]
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return "words" if step["use_regex"] else None
    if kind == "Digits" and step["individual_digits"]:
        return "digits"
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return str(step["pattern"].get("Regex", step["pattern"]))
    return json.dumps(step)
