"""Laws of canonical bytes, against the RFC 8785 package as oracle."""

from __future__ import annotations

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from audit.canonical import MAX_INTEGER, LeafError, by_json, by_orjson, canonical, parse_leaf
from audit.records import Json

_keys = st.text(alphabet="abcxyz0189_", min_size=1, max_size=6)
_texts = st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=40)
_scalars = st.none() | st.booleans() | st.integers(-MAX_INTEGER, MAX_INTEGER) | _texts
_values: st.SearchStrategy[Json] = st.recursive(
    _scalars, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(_keys, inner, max_size=5), max_leaves=25
)
_leaves = st.dictionaries(_keys, _values, max_size=6)


@given(_values)
def test_canonical_bytes_are_those_of_rfc8785(value: Json) -> None:
    assert canonical(value) == rfc8785.dumps(value)  # type: ignore[arg-type]


@given(_values)
def test_both_libraries_write_the_same_bytes(value: Json) -> None:
    assert by_json(value) == by_orjson(value) == canonical(value)


@given(_leaves)
def test_a_leaf_reads_back_as_it_was_written(value: dict[str, Json]) -> None:
    assert parse_leaf(canonical(value)) == value


@given(_leaves, st.data())
def test_a_changed_byte_is_refused_or_means_something_else(value: dict[str, Json], data: st.DataObject) -> None:
    leaf = bytearray(canonical(value))
    at = data.draw(st.integers(0, len(leaf) - 1))
    leaf[at] ^= data.draw(st.integers(1, 255))
    try:
        parsed = parse_leaf(bytes(leaf))
    except LeafError:
        return
    assert canonical(parsed) == bytes(leaf) != canonical(value)


@given(st.binary(max_size=60))
def test_arbitrary_bytes_are_refused_by_name_or_canonical(leaf: bytes) -> None:
    try:
        parsed = parse_leaf(leaf)
    except LeafError:
        return
    assert canonical(parsed) == leaf


@given(_leaves, st.sampled_from([b" ", b"\n", b"\t", b"\0"]), st.data())
def test_a_byte_put_between_tokens_is_refused(value: dict[str, Json], padding: bytes, data: st.DataObject) -> None:
    leaf = canonical(value)
    at = data.draw(st.sampled_from([0, 1, len(leaf) - 1, len(leaf)]))
    with pytest.raises(LeafError):
        parse_leaf(leaf[:at] + padding + leaf[at:])
