"""JSON as JavaScript writes it.

What belongs here: turning a value into exactly the bytes of `JSON.stringify(value)`. What does not: what is in one.

A receiver in JavaScript checks the signature over `JSON.stringify(req.body)`, its own rendering of what it parsed, so
ours has to be that rendering. The rules are ECMA-262's `SerializeJSONProperty` and `QuoteJSONString`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TypeAlias

JsonValue: TypeAlias = bool | int | str | Sequence["JsonValue"] | Mapping[str, "JsonValue"] | None

MAX_SAFE_INTEGER = 2**53 - 1  # ECMA-262, Number.MAX_SAFE_INTEGER

_SURROGATE = re.compile("[\ud800-\udfff]")
_ARRAY_INDEX = re.compile("0|[1-9][0-9]*", re.ASCII)


def stringify(value: JsonValue) -> bytes:
    """`JSON.stringify(value)` in UTF-8: the bytes that a JavaScript program gets by parsing and writing them again.

    Raises:
        TypeError: A value JSON has no exact form for on both sides: floats, bytes, dates.
        ValueError: An integer that a JavaScript number cannot hold, or a key it would move (`"1"`).
    """
    _require_stable(value)
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    # Two halves of a pair side by side are one character to JavaScript; only a half alone is written as an escape.
    text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
    return _SURROGATE.sub(lambda half: f"\\u{ord(half[0]):04x}", text).encode()


def _require_stable(value: JsonValue) -> None:
    if value is None or isinstance(value, (bool, str)):
        return
    if isinstance(value, int):
        if abs(value) > MAX_SAFE_INTEGER:
            raise ValueError("an integer beyond 2**53 - 1 loses digits in JavaScript")
    elif isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise TypeError("a key is not text")
            if _ARRAY_INDEX.fullmatch(key):
                raise ValueError("JavaScript puts a key that is a whole number first")
            _require_stable(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _require_stable(inner)
    else:
        raise TypeError(f"{type(value).__name__} has no exact form in JSON")
