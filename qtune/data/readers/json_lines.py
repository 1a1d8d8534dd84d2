"""JSON lines, read line by line, so that the size of a file does not matter.

Parsed here rather than by a library because a mistake has to name its line and column.
"""

import codecs
import json
from pathlib import Path
from typing import Any

from qtune.data.records import Broken, Records, not_utf8, opened


def read(path: Path, skip: int = 0) -> Records:
    """The value of every line that is not blank, numbered by line."""
    with opened(path) as file:
        # Lines of bytes end at line breaks only: JSON strings may hold U+2028 and its like.
        for number, line in enumerate(file, start=1):
            content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not content.strip():
                continue
            if skip:
                skip -= 1
                continue
            yield number, _value(content)


def _value(line: bytes) -> Any:
    try:
        return json.loads(line.decode().rstrip("\r\n"))
    except UnicodeDecodeError as error:
        return not_utf8(error)
    except json.JSONDecodeError as error:
        return Broken(f"not valid JSON: {error.msg}", error.colno)
    # Numbers of thousands of digits, and lists nested as deep.
    except (ValueError, RecursionError) as error:
        return Broken(f"not valid JSON: {error}")
