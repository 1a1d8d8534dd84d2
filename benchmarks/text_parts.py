"""A text cut into a part to learn or calibrate on and a held-out one at its end."""

from pathlib import Path
from typing import NamedTuple

from qtune.files import write_text

HELD_OUT_SHARE = 0.06


class TextParts(NamedTuple):
    """Files of the two parts."""

    train: str
    held_out: str


def text_parts(text: Path, folder: Path) -> TextParts:
    """The parts of a text file, written into the folder; they meet at the end of a line."""
    whole = text.read_text(encoding="utf-8")
    border = whole.index("\n", int(len(whole) * (1 - HELD_OUT_SHARE)))
    folder.mkdir(parents=True, exist_ok=True)
    parts = TextParts(str(folder / "train.txt"), str(folder / "held-out.txt"))
    write_text(Path(parts.train), whole[:border])
    write_text(Path(parts.held_out), whole[border:])
    return parts
