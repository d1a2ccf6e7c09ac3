"""A leaf as its members: built by the writer, read back by the verifier and the reader.

The example stands in records.py; `Leaf.encode` gives those bytes and `Leaf.parse` takes no others. `identities`,
`parts` and `body` are always present, if empty; `request` is absent where the record belongs to none. A member that
version 1 does not know is refused: a leaf says nothing that a verifier overlooks.

Knows no database and no keys.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from audit.canonical import LeafError, canonical_leaf, parse_leaf
from audit.records import LEAF_VERSION, Json, RecordType

# LeafError (canonical.py)
# └── LeafMalformed    canonical JSON, but not a leaf of version 1


class LeafMalformed(LeafError):
    """The leaf lacks a member, has one too many, or one of the wrong form."""


FIRST_PREV = "0" * 64  # `prev` of a writer's first leaf in a log

_HASH = re.compile(r"[0-9a-f]{64}")
_NONCE = re.compile(r"[0-9a-f]{32}")
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z", re.ASCII)
_NAME = re.compile(r"[a-z0-9_]+")
_REQUIRED = frozenset(
    ("body", "identities", "log", "nonce", "parts", "prev", "record", "time", "type", "v", "writer", "writer_seq")
)


@dataclass(frozen=True, slots=True)
class PartCommitment:
    """What a leaf says of one part of its content; see content.py."""

    name: str  # `[a-z0-9_]+`
    com: str  # 64 hex digits
    ct: str  # 64 hex digits


@dataclass(frozen=True, slots=True)
class Leaf:
    log: str  # the log's origin
    writer: str
    writer_seq: int  # 0, 1, 2, … per writer and log
    prev: str  # 64 hex digits: the hash of this writer's previous leaf in this log, FIRST_PREV for its first
    record: str  # id of the record, UUIDv7
    type: RecordType
    time: str  # UTC, microseconds: `2026-11-20T19:43:00.123456Z`
    nonce: str  # 32 hex digits, random: equal records have different leaves
    body: Mapping[str, Json]
    request: str | None = None  # id of the request it belongs to, UUIDv7
    parts: Sequence[PartCommitment] = ()
    identities: Mapping[str, str] = field(default_factory=dict)  # kind → pseudonym, 32 hex digits

    def encode(self) -> bytes:
        """Return the canonical bytes.

        Raises:
            NotRepresentable: the body holds what a leaf cannot.
            LeafTooLarge: more than 65,535 bytes.
        """
        members: dict[str, Json] = {
            "v": LEAF_VERSION,
            "log": self.log,
            "writer": self.writer,
            "writer_seq": self.writer_seq,
            "prev": self.prev,
            "record": self.record,
            "type": self.type.value,
            "time": self.time,
            "nonce": self.nonce,
            "body": self.body,
            "parts": [{"name": part.name, "com": part.com, "ct": part.ct} for part in self.parts],
            "identities": self.identities,
        }
        if self.request is not None:
            members["request"] = self.request
        return canonical_leaf(members)

    @classmethod
    def parse(cls, leaf: bytes) -> Leaf:
        """Read the bytes of a leaf.

        Raises:
            NotCanonical, LeafTooLarge: see `parse_leaf`.
            LeafMalformed: canonical, but not a leaf of version 1.
        """
        members = parse_leaf(leaf)
        if members.get("v") != LEAF_VERSION or isinstance(members["v"], bool):
            raise LeafMalformed("the leaf is not of version 1")
        if members.keys() - {"request"} != _REQUIRED:
            raise LeafMalformed("the leaf lacks a member, or has one that version 1 does not know")
        return cls(
            log=_text(members, "log"),
            writer=_text(members, "writer"),
            writer_seq=_count(members, "writer_seq"),
            prev=_text(members, "prev", _HASH),
            record=_text(members, "record"),
            type=_type(members),
            time=_text(members, "time", _TIME),
            nonce=_text(members, "nonce", _NONCE),
            body=_mapping(members, "body"),
            request=_text(members, "request") if "request" in members else None,
            parts=_parts(members),
            identities={kind: _text(_mapping(members, "identities"), kind) for kind in _mapping(members, "identities")},
        )


def _text(members: Mapping[str, Json], name: str, pattern: re.Pattern[str] | None = None) -> str:
    value = members.get(name)
    if not isinstance(value, str) or not value or (pattern is not None and not pattern.fullmatch(value)):
        raise LeafMalformed(f"`{name}` of the leaf is not of its form")
    return value


def _count(members: Mapping[str, Json], name: str) -> int:
    value = members.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise LeafMalformed(f"`{name}` of the leaf is not a count")
    return value


def _mapping(members: Mapping[str, Json], name: str) -> Mapping[str, Json]:
    value = members.get(name)
    if not isinstance(value, Mapping):
        raise LeafMalformed(f"`{name}` of the leaf is not an object")
    return value


def _type(members: Mapping[str, Json]) -> RecordType:
    try:
        return RecordType(_text(members, "type"))
    except ValueError as error:
        raise LeafMalformed("the leaf is of a record type that version 1 does not know") from error


def _parts(members: Mapping[str, Json]) -> tuple[PartCommitment, ...]:
    values = members.get("parts")
    if not isinstance(values, list):
        raise LeafMalformed("`parts` of the leaf is not a list")
    parts = tuple(_part(value) for value in values)
    if len({part.name for part in parts}) != len(parts):
        raise LeafMalformed("the leaf names a part twice")
    return parts


def _part(value: Json) -> PartCommitment:
    if not isinstance(value, Mapping) or value.keys() != {"name", "com", "ct"}:
        raise LeafMalformed("a part of the leaf has not the members `name`, `com` and `ct`")
    return PartCommitment(_text(value, "name", _NAME), _text(value, "com", _HASH), _text(value, "ct", _HASH))
