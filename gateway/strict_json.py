"""JSON as the gateway reads it from strangers: one meaning per text, or refused.

RFC 8259 leaves open what a repeated name, a huge number or half a surrogate pair means; two parsers that disagree are a
way around whatever the first one checked. Here each is refused, and so are `NaN` and `Infinity`, which are not JSON.
Knows nothing of HTTP. Never puts the text, or any part of it, in an error.

Source: RFC 8259 sections 4, 6, 8; RFC 7493 (I-JSON).
"""

from __future__ import annotations

import json
import math
import re

MAX_DEPTH = 64  # arrays and objects inside each other

# Strings and brackets. A string that never ends is matched up to the end, so the scan is linear in any text.
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\(?:.|\Z))*+(?:"|\Z)|[\[\]{}]', re.DOTALL)
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


class MalformedJson(ValueError):
    """The text is not one JSON value with one meaning. The message names the rule that was broken, never the text."""


def parse_json(data: bytes, *, max_depth: int = MAX_DEPTH) -> object:
    """Return the value that `data` is the JSON text of.

    Raises: MalformedJson.
    Cost: about 2 µs per KB, more with many brackets.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise MalformedJson("not valid UTF-8") from None
    _refuse_deep(text, max_depth)
    try:
        value = _decode(text)
    except MalformedJson:
        raise
    except (ValueError, RecursionError):
        raise MalformedJson("not valid JSON") from None
    if _SURROGATE_ESCAPE.search(text):
        _refuse_half_surrogates(value)
    return value


def _object_without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise MalformedJson("a name is repeated in an object")
    return members


def _finite(literal: str) -> float:
    number = float(literal)
    if not math.isfinite(number):
        raise MalformedJson("a number is out of range")
    return number


def _refuse_constant(_: str) -> object:
    raise MalformedJson("`NaN` and `Infinity` are not JSON")


_decode = json.JSONDecoder(
    object_pairs_hook=_object_without_repeats, parse_float=_finite, parse_constant=_refuse_constant
).decode


def _refuse_deep(text: str, max_depth: int) -> None:
    if text.count("[") + text.count("{") <= max_depth:
        return
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        character = text[match.start()]
        if character in "[{":
            depth += 1
            if depth > max_depth:
                raise MalformedJson(f"nested deeper than {max_depth}")
        elif character in "]}":
            depth -= 1


def _refuse_half_surrogates(value: object) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise MalformedJson("a string holds half of a surrogate pair") from None
