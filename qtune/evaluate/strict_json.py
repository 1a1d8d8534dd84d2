"""JSON values compared as values: order of keys and spacing do not count, everything else does.

Types differ (1 is neither "1" nor true; 1.0 is no integer), an object that repeats a key is none,
and neither is a value with text around it.
"""

import json
from typing import Any, NoReturn


def parsed(text: str) -> Any:
    """The JSON value that is the whole text.

    ValueError: it is none, or an object repeats a key. RecursionError: it nests too deeply.
    """
    return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse)


def same(a: Any, b: Any) -> bool:
    """Whether two parsed values are the same, in type too."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key comes twice")
    return made


def _refuse(constant: str) -> NoReturn:
    # Python reads NaN and Infinity, which JSON does not have
    raise ValueError(f"{constant} is not JSON")
