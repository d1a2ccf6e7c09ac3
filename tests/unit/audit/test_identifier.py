"""UUIDv7: the layout of RFC 9562, and ids that sort by time."""

from __future__ import annotations

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit.identifier import NOISE_BYTES, uuid7

MOMENTS = st.integers(0, 2**48 - 1)
NOISE = st.binary(min_size=NOISE_BYTES, max_size=NOISE_BYTES)


@given(MOMENTS, NOISE)
def test_version_variant_and_moment_stand_where_the_rfc_puts_them(moment: int, noise: bytes) -> None:
    parsed = uuid.UUID(uuid7(moment, noise))
    assert parsed.version == 7
    assert parsed.variant == uuid.RFC_4122
    assert parsed.int >> 80 == moment


@given(MOMENTS, MOMENTS, NOISE, NOISE)
def test_an_earlier_id_sorts_first_whatever_its_noise(one: int, other: int, first: bytes, second: bytes) -> None:
    if one < other:
        assert uuid7(one, first) < uuid7(other, second)


@given(MOMENTS, NOISE, NOISE)
def test_seventy_four_bits_of_noise_are_kept(moment: int, first: bytes, second: bytes) -> None:
    mask = (1 << 74) - 1
    same = int.from_bytes(first, "big") & mask == int.from_bytes(second, "big") & mask
    assert (uuid7(moment, first) == uuid7(moment, second)) == same


@pytest.mark.parametrize(("moment", "noise"), [(-1, bytes(10)), (2**48, bytes(10)), (0, bytes(9)), (0, bytes(11))])
def test_what_does_not_fit_is_refused(moment: int, noise: bytes) -> None:
    with pytest.raises(ValueError, match="must fit"):
        uuid7(moment, noise)
