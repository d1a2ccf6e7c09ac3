"""The leaf: the golden bytes, and no others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from audit.canonical import LeafError, LeafTooLarge, NotRepresentable, canonical, leaf_hash
from audit.leaf import FIRST_PREV, Leaf, LeafMalformed, PartCommitment
from audit.records import RecordType

GOLDEN = Path(__file__).parents[2] / "golden" / "audit"
STORED = (GOLDEN / "leaf.json").read_bytes()
LEAF = Leaf.parse(STORED)


def _changed(**members: Any) -> bytes:
    return canonical({**json.loads(STORED), **members})


def _without(name: str) -> bytes:
    return canonical({key: value for key, value in json.loads(STORED).items() if key != name})


def test_the_golden_leaf_has_the_golden_hash_and_reads_back() -> None:
    assert leaf_hash(STORED).hex() == (GOLDEN / "leaf.sha256").read_text().strip()
    assert LEAF.encode() == STORED
    assert (LEAF.writer, LEAF.writer_seq, LEAF.type) == ("6f1d2a0b9c3e4d57", 41, RecordType.REQUEST_RECEIVED)
    content = json.loads((GOLDEN / "content.json").read_text(encoding="utf-8"))
    assert LEAF.parts == (PartCommitment("prompt", content["com"], content["ct"]),)


def test_the_smallest_leaf_reads_back() -> None:
    small = replace(LEAF, request=None, parts=(), identities={}, body={}, writer_seq=0, prev=FIRST_PREV)
    assert Leaf.parse(small.encode()) == small
    assert b"request" not in small.encode().replace(b"request.received", b"")


@pytest.mark.parametrize(
    "name",
    ["body", "identities", "log", "nonce", "parts", "prev", "record", "time", "type", "v", "writer", "writer_seq"],
)
def test_a_leaf_that_lacks_a_member_is_refused(name: str) -> None:
    with pytest.raises(LeafMalformed):
        Leaf.parse(_without(name))


@pytest.mark.parametrize(
    "members",
    [
        {"extra": 1},
        {"v": 2},
        {"v": True},
        {"v": "1"},
        {"log": ""},
        {"log": 7},
        {"writer": ""},
        {"writer_seq": -1},
        {"writer_seq": True},
        {"writer_seq": "41"},
        {"prev": "ab"},
        {"prev": "AB" * 32},
        {"prev": "ab" * 32 + "\n"},
        {"nonce": "5e0c"},
        {"record": None},
        {"request": None},
        {"request": ""},
        {"time": "2026-11-20T19:43:00Z"},
        {"time": "2026-11-20 19:43:00.123456Z"},
        {"time": "2026-11-20T19:43:00.123456+00:00"},
        {"time": 1},
        {"type": "request.invented"},
        {"type": ["request.received"]},
        {"body": []},
        {"identities": []},
        {"identities": {"subject": 7}},
        {"identities": {"subject": ""}},
        {"parts": {}},
        {"parts": ["prompt"]},
        {"parts": [{"name": "prompt", "com": "ab" * 32}]},
        {"parts": [{"name": "prompt", "com": "ab" * 32, "ct": "ab" * 31}]},
        {"parts": [{"name": "Prompt", "com": "ab" * 32, "ct": "ab" * 32}]},
        {"parts": [{"name": "prompt", "com": "ab" * 32, "ct": "ab" * 32, "key": "x"}]},
        {"parts": [{"name": "prompt", "com": "ab" * 32, "ct": "ab" * 32}] * 2},
    ],
)
def test_a_leaf_with_a_member_of_another_form_is_refused(members: dict[str, Any]) -> None:
    with pytest.raises(LeafMalformed):
        Leaf.parse(_changed(**members))


def test_a_body_that_cannot_stand_in_a_leaf_is_refused() -> None:
    with pytest.raises(NotRepresentable):
        replace(LEAF, body={"temperature": 0.7}).encode()  # type: ignore[dict-item]
    with pytest.raises(LeafTooLarge):
        replace(LEAF, body={"text": "x" * 65_535}).encode()


def test_equal_records_with_different_nonces_are_different_leaves() -> None:
    assert replace(LEAF, nonce="ab" * 16).encode() != LEAF.encode()


def test_an_error_says_nothing_of_what_the_leaf_holds() -> None:
    with pytest.raises(LeafError) as caught:
        Leaf.parse(_changed(type="private words"))
    assert "private" not in str(caught.value)
