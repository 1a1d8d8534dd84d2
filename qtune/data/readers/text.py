"""Text files: each is one row with the column `text`."""

from pathlib import Path

from qtune.data.records import Records, not_utf8, opened


def read(path: Path, skip: int = 0) -> Records:
    """The whole text as the only row."""
    if skip:
        return
    with opened(path) as file:
        content = file.read()
    try:
        yield 1, {"text": content.decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        yield content.count(b"\n", 0, error.start) + 1, not_utf8(error)
