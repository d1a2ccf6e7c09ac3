"""The leaf's bytes: one encoding for each value, and no other accepted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import pytest
import rfc8785

from audit.canonical import (
    MAX_DEPTH,
    LeafError,
    LeafTooLarge,
    NotCanonical,
    NotRepresentable,
    canonical,
    canonical_leaf,
    leaf_hash,
    parse_leaf,
)
from audit.records import MAX_LEAF_BYTES, Json, RecordType


def _nested(depth: int) -> Json:
    value: Json = []
    for _ in range(depth - 1):
        value = [value]
    return value


def test_members_are_sorted_and_nothing_is_padded() -> None:
    assert canonical({"b": [1, None, True], "a_1": {"z": "", "0": -5}}) == b'{"a_1":{"0":-5,"z":""},"b":[1,null,true]}'


def test_every_single_character_is_written_as_rfc8785_writes_it() -> None:
    for code in [*range(0x300), 0x2028, 0x2029, 0xD7FF, 0xE000, 0xFEFF, 0xFFFD, 0xFFFF, 0x10000, 0x10FFFF]:
        value = {"text": chr(code)}
        assert canonical(value) == rfc8785.dumps(value)
        assert parse_leaf(canonical(value)) == value


def test_an_enumeration_is_written_as_its_text() -> None:
    assert canonical({"type": RecordType.LOG_OPENED}) == b'{"type":"log.opened"}'


def test_any_mapping_and_sequence_is_written_as_object_and_list() -> None:
    class Frozen(Mapping[str, Json]):
        def __getitem__(self, key: str) -> Json:
            return {"b": 1, "a": 2}[key]

        def __iter__(self):  # type: ignore[no-untyped-def]
            return iter(("b", "a"))

        def __len__(self) -> int:
            return 2

    assert canonical({"m": Frozen(), "s": (1, 2)}) == b'{"m":{"a":2,"b":1},"s":[1,2]}'


@pytest.mark.parametrize("key", ["", "A", "a-b", "é", "a b", "a\n", "a.b", "ａ", "٣"])
def test_a_key_outside_the_profile_is_refused(key: str) -> None:
    with pytest.raises(NotRepresentable, match="object key"):
        canonical({"outer": [{key: 1}]})


def test_a_key_that_is_no_text_is_refused() -> None:
    with pytest.raises(NotRepresentable):
        canonical({1: "one"})  # type: ignore[dict-item]


@pytest.mark.parametrize("value", [0.5, float("nan"), float("inf"), b"bytes", bytearray(), {1, 2}, object(), 1j])
def test_a_type_outside_the_profile_is_refused(value: Json) -> None:
    with pytest.raises(NotRepresentable):
        canonical({"a": [value]})


def test_integers_are_exact_up_to_2_to_the_53_and_refused_beyond() -> None:
    for value in (2**53 - 1, -(2**53) + 1, 0):
        assert parse_leaf(canonical({"n": value})) == {"n": value}
    for value in (2**53, -(2**53), 10**5000):
        with pytest.raises(NotRepresentable, match="integer"):
            canonical({"n": value})


@pytest.mark.parametrize("text", ["\ud800", "ok\udfff", "\udc00\ud800"])
def test_a_lone_surrogate_is_refused(text: str) -> None:
    with pytest.raises(NotRepresentable, match="surrogate"):
        canonical({"text": text})


def test_nesting_is_bounded() -> None:
    assert canonical(_nested(MAX_DEPTH)) == b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
    with pytest.raises(NotRepresentable, match="nested"):
        canonical(_nested(MAX_DEPTH + 1))


def test_a_leaf_has_at_most_65535_bytes() -> None:
    empty = len(canonical({"text": ""}))
    full = canonical_leaf({"text": "x" * (MAX_LEAF_BYTES - empty)})
    assert len(full) == MAX_LEAF_BYTES
    assert parse_leaf(full)
    with pytest.raises(LeafTooLarge):
        canonical_leaf({"text": "x" * (MAX_LEAF_BYTES - empty + 1)})
    with pytest.raises(LeafTooLarge):
        parse_leaf(b'{"text":"' + b"x" * (MAX_LEAF_BYTES - empty + 1) + b'"}')


@pytest.mark.parametrize(
    "leaf",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"1",
        b'{"a":1} ',
        b' {"a":1}',
        b'{"a": 1}',
        b'{"a":1}\n',
        b'{"b":1,"a":2}',
        b'{"a":1,"a":1}',
        b'{"a":1,"a":2}',
        b'{"a":{"b":1,"b":1}}',
        b'{"a":1.0}',
        b'{"a":1e0}',
        b'{"a":-0}',
        b'{"a":01}',
        b'{"a":+1}',
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":-Infinity}',
        b'{"a":9007199254740992}',
        b'{"a":' + b"9" * 5000 + b"}",
        b'{"a":"\\u0041"}',
        b'{"a":"\\/"}',
        b'{"a":"\\u000A"}',
        b'{"a":"\\u000a"}',
        b'{"a":"\\u001F"}',
        b'{"a":"\\ud800"}',
        b'{"a":"\\ud83d\\ude00"}',
        b'{"\\u0061":1}',
        b'{"A":1}',
        b'{"a":"\x1f"}',
        b'{"a":"\xff"}',
        b'{"a":"\xed\xa0\x80"}',
        b'\xef\xbb\xbf{"a":1}',
        b"[" * 60_000,
        b'{"a":' * 10_000,
        b'{"a":' + b"[" * 33 + b"]" * 33 + b"}",
    ],
)
def test_bytes_that_are_not_their_own_canonical_form_are_refused(leaf: bytes) -> None:
    with pytest.raises(NotCanonical):
        parse_leaf(leaf)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "utf-32-be"])
def test_only_utf8_is_read(encoding: str) -> None:
    with pytest.raises(NotCanonical):
        parse_leaf('{"a":1}'.encode(encoding))


def test_an_error_never_repeats_what_the_leaf_says() -> None:
    with pytest.raises(LeafError) as caught:
        parse_leaf(b'{"prompt":"very private",')
    assert "private" not in str(caught.value)


def test_the_leaf_hash_is_domain_separated_from_the_bare_hash() -> None:
    leaf = canonical({"v": 1})
    assert leaf_hash(leaf) == hashlib.sha256(b"\x00" + json.dumps({"v": 1}).replace(" ", "").encode()).digest()
    assert leaf_hash(leaf) != hashlib.sha256(leaf).digest()
