"""Strict JSON: one meaning per text, or a refusal that repeats nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.strict_json import MAX_DEPTH, MalformedJson, parse_json

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    # Surrogates are no characters: text() leaves them out on request.
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(json_values, st.booleans())
def test_what_python_writes_is_read_back(value: Any, ascii_only: bool) -> None:
    assert parse_json(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@given(
    st.binary(max_size=200)
    | st.text(alphabet='[]{}",:\\0e.-tfnulN\ud83d', max_size=200).map(lambda t: t.encode("utf-8", "surrogatepass"))
)
def test_any_bytes_are_a_value_or_refused(data: bytes) -> None:
    assert outcome(data) in MESSAGES


def outcome(data: bytes) -> str:
    try:
        parse_json(data)
    except MalformedJson as error:
        return str(error)
    return "a value"


MESSAGES = {
    "a value",
    "not valid UTF-8",
    "not valid JSON",
    "a name is repeated in an object",
    "a number is out of range",
    "`NaN` and `Infinity` are not JSON",
    f"nested deeper than {MAX_DEPTH}",
    "a string holds half of a surrogate pair",
}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a":1,"a":1}', "repeated"),
        (b'[{"b":{"a":1,"\\u0061":2}}]', "repeated"),
        (b"NaN", "NaN"),
        (b"[-Infinity]", "NaN"),
        (b"1e999", "out of range"),
        (b'{"a":-1e400}', "out of range"),
        (b"9" * 5000, "not valid JSON"),
        (b'"\xff"', "UTF-8"),
        (b'"\xed\xa0\x80"', "UTF-8"),
        ('"a"'.encode("utf-16"), "UTF-8"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        (b'"\\ud800"', "surrogate"),
        (b'{"\\uDFFFx":1}', "surrogate"),
        (b"", "not valid JSON"),
        (b"{} {}", "not valid JSON"),
        (b"[1,]", "not valid JSON"),
        (b"{'a':1}", "not valid JSON"),
        (b'"\n"', "not valid JSON"),
    ],
)
def test_hostile_texts_are_refused_by_the_rule_they_break(text: bytes, message: str) -> None:
    with pytest.raises(MalformedJson, match=message):
        parse_json(text)


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_depth_is_counted_at_the_boundary(opening: bytes) -> None:
    closing = b"]" if opening == b"[" else b"}"
    assert parse_json(opening * MAX_DEPTH + b"1" + closing * MAX_DEPTH) is not None
    with pytest.raises(MalformedJson, match="deeper"):
        parse_json(opening * (MAX_DEPTH + 1) + b"1" + closing * (MAX_DEPTH + 1))


def test_brackets_in_strings_and_side_by_side_are_not_depth() -> None:
    assert parse_json(json.dumps(["[{" * 100, '\\"[[[' * 100]).encode()) == ["[{" * 100, '\\"[[[' * 100]
    assert parse_json(b"[" + b",".join([b"[]"] * 500) + b"]") == [[]] * 500


@pytest.mark.parametrize("text", [b"[" * 1_000_000, b'"' * 1_000_000 + b"[" * 100, b'"\\' * 500_000 + b"[" * 100])
def test_a_megabyte_of_openings_is_refused_in_one_pass(text: bytes) -> None:
    with pytest.raises(MalformedJson):
        parse_json(text)


def test_a_pair_of_surrogate_escapes_is_one_character() -> None:
    assert parse_json(b'"\\ud83d\\ude00"') == "😀"
