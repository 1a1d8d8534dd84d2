"""Plain texts, for continued pretraining: `{"text": ...}`, learned from the first to the last."""

from qtune.data.format import Format, Parts, Record
from qtune.data.values import text


def _parts(record: Record) -> Parts:
    return Parts([{"role": "assistant", "content": text(record["text"], "text")}], plain=True)


FORMAT = Format((frozenset({"text"}),), frozenset(), _parts)
