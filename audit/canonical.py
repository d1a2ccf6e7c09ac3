"""Canonical bytes of a leaf: RFC 8785 (JCS) over the profile leaves may use, and their hash.

The profile is narrow on purpose, so that every language's JSON library can reproduce the bytes: object keys are
`[a-z0-9_]+` (sorting by code point, by UTF-16 unit and by byte is then the same), there are no floats, integers lie
within ±(2**53 − 1), and text holds no lone surrogates. Example:

    canonical({"v": 1, "temperature": "0.7", "roles": ["app"]})
    → b'{"roles":["app"],"temperature":"0.7","v":1}'

Knows no record types and no database. Source: RFC 8785; RFC 9162 section 2.1.1 (the leaf hash).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

from audit.records import MAX_LEAF_BYTES, Json

try:
    import orjson
except ModuleNotFoundError:  # an auditor needs nothing but Python; where every answer waits for its leaf, it is there
    orjson = None  # type: ignore[assignment]  # declared by the import as a module

# LeafError                catch this: the leaf cannot stand, or cannot have been written by us
# ├── NotRepresentable     a value to encode is outside the profile: the caller is wrong
# ├── LeafTooLarge         more than 65,535 bytes
# └── NotCanonical         bytes to parse are not the one encoding of what they say


class LeafError(ValueError):
    """A leaf cannot be encoded, or its bytes are not a leaf."""


class NotRepresentable(LeafError):
    """A value has no canonical form in the leaf profile."""


class LeafTooLarge(LeafError):
    """The canonical bytes exceed 65,535."""


class NotCanonical(LeafError):
    """The bytes are not the canonical form of any value."""


MAX_INTEGER = 2**53 - 1  # the largest integer every JSON reader keeps exact
MAX_DEPTH = 32  # nested lists and objects, the outermost included
LEAF_PREFIX = b"\x00"  # domain separation of leaves from inner nodes (0x01)

_KEY = re.compile(r"[a-z0-9_]+")


def canonical(value: Json) -> bytes:
    """Return the one canonical encoding of `value`.

    Raises:
        NotRepresentable: a key, number, text or type is outside the profile, or the nesting is deeper than 32.
    """
    _check(value, 1)
    return _encode(value)


def canonical_leaf(value: Mapping[str, Json]) -> bytes:
    """Return the bytes of a leaf: `canonical`, at most 65,535 bytes.

    Raises:
        NotRepresentable: see `canonical`.
        LeafTooLarge: too many bytes.
    """
    leaf = canonical(value)
    if len(leaf) > MAX_LEAF_BYTES:
        raise LeafTooLarge(f"the leaf has {len(leaf)} bytes; at most {MAX_LEAF_BYTES} fit")
    return leaf


def parse_leaf(leaf: bytes) -> dict[str, Json]:
    """Return the object whose canonical form is exactly `leaf`.

    Hash first, parse second: whatever two parsers might disagree about is refused here, so that the hash and the
    meaning are of the same thing.

    Raises:
        LeafTooLarge: more than 65,535 bytes.
        NotCanonical: not UTF-8, not JSON, not an object, a repeated key, or any other encoding than the canonical.
    """
    if len(leaf) > MAX_LEAF_BYTES:
        raise LeafTooLarge(f"the leaf has {len(leaf)} bytes; at most {MAX_LEAF_BYTES} fit")
    try:
        # Decoded here: given bytes, `json.loads` would also accept UTF-16 and UTF-32.
        value = json.loads(
            leaf.decode("utf-8"), object_pairs_hook=_unique, parse_float=_no_float, parse_constant=_no_float
        )
        again = canonical(value)
    except NotCanonical:
        raise
    except (ValueError, RecursionError) as error:
        raise NotCanonical("the leaf is not canonical JSON") from error
    if not isinstance(value, dict):
        raise NotCanonical("the leaf is not a JSON object")
    if again != leaf:
        raise NotCanonical("the leaf is not its own canonical form")
    return value


def leaf_hash(leaf: bytes) -> bytes:
    """Return the Merkle leaf hash, 32 bytes: SHA-256(0x00 ‖ leaf)."""
    return hashlib.sha256(LEAF_PREFIX + leaf).digest()


def _check(value: Json, depth: int) -> None:
    kind = type(value)  # the common kinds first: this runs for every member of every leaf
    if kind is str:
        _check_text(value)  # type: ignore[arg-type]
    elif value is None or kind is bool:
        return
    elif isinstance(value, int):
        if abs(value) > MAX_INTEGER:
            raise NotRepresentable("an integer lies outside ±(2**53 − 1); write it as text")
    elif isinstance(value, str):
        _check_text(value)
    elif depth > MAX_DEPTH:
        raise NotRepresentable(f"the value is nested deeper than {MAX_DEPTH}")
    elif kind is dict or isinstance(value, Mapping):
        for key, member in value.items():  # type: ignore[union-attr]
            _check_key(key)
            if type(member) is not str or not member.isascii():  # as most are, of every leaf
                _check(member, depth + 1)
    elif kind is list or (isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray, memoryview))):
        for member in value:
            _check(member, depth + 1)
    else:
        raise NotRepresentable(f"`{type(value).__name__}` has no canonical form; write decimals and bytes as text")


@lru_cache(maxsize=4096)  # there are few keys, and only good ones are kept
def _check_key(key: object) -> None:
    if type(key) is not str or not _KEY.fullmatch(key):
        raise NotRepresentable("an object key is not of the form `[a-z0-9_]+`")


def _check_text(text: str) -> None:
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise NotRepresentable("a text holds a lone surrogate") from error


def _plain(value: object) -> object:
    """Give `json` a dict or list for the mappings and sequences it does not know; `_check` passed them."""
    return dict(value) if isinstance(value, Mapping) else list(value)  # type: ignore[call-overload]


_ENCODER = json.JSONEncoder(
    sort_keys=True,
    separators=(",", ":"),
    ensure_ascii=False,
    check_circular=False,  # `_check` stops at its depth
    default=_plain,
)


def by_json(value: Json) -> bytes:
    return _ENCODER.encode(value).encode("utf-8")


def by_orjson(value: Json) -> bytes:
    return orjson.dumps(value, _plain, orjson.OPT_SORT_KEYS)


# Of a checked value, sorted and compact JSON of either library is RFC 8785: only `"`, `\` and U+0000…U+001F are
# escaped, with the short forms where JSON has them and lower-case hex elsewhere, and other text is left as it is.
_encode = by_json if orjson is None else by_orjson


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise NotCanonical("an object repeats a key")
    return value


def _no_float(_: str) -> Json:
    raise NotCanonical("the leaf holds a number that is not an integer")
