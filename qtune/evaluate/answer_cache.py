"""Answers that a model has given before, so that measuring it again asks only what is new.

Kept by question, not by task: a larger limit, a second task over the same rows or a corrected
metric cost only what was not asked yet, and a long evaluation that was interrupted goes on where it
was. A file belongs to one model (fingerprint) and grows line by line.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qtune.cache import cache_folder


class AnswerCache:
    """Answers by their questions, in the file of one model."""

    def __init__(self, model: str) -> None:
        self._path = cache_folder() / "answers" / f"{model}.jsonl"
        self._answers = dict(_read(self._path))

    def __contains__(self, question: str) -> bool:
        return question in self._answers

    def __getitem__(self, question: str) -> Any:
        return self._answers[question]

    def add(self, questions: Sequence[str], answers: Sequence[Any]) -> None:
        """Keep the answers to these questions, in memory and in the file."""
        new = dict(zip(questions, answers, strict=True))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(pair) + "\n" for pair in new.items())
        self._answers |= new


def question(kind: str, arguments: Sequence[Any]) -> str:
    """The key of a question: a hash of how it is asked and of all that is asked."""
    return hashlib.sha256(json.dumps([kind, *arguments]).encode()).hexdigest()


def _read(path: Path) -> Iterator[tuple[str, Any]]:
    """(question, answer) of each line; a last one that a killed process left unfinished is cut."""
    content = path.read_bytes() if path.exists() else b""
    whole, _, unfinished = content.rpartition(b"\n")
    if unfinished:
        os.truncate(path, len(content) - len(unfinished))
    for line in whole.splitlines():
        key, answer = json.loads(line)
        yield key, answer
