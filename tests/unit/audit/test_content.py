"""Content: the golden commitment, and every way it must not open."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from audit.content import (
    CiphertextChanged,
    CommitmentMismatch,
    ContentError,
    NameNotAllowed,
    NotOpenable,
    Opening,
    SealedPart,
    check_ciphertext,
    check_opening,
    ciphertext_hash,
    commitment,
    open_part,
    seal,
)

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "audit" / "content.json").read_text(encoding="utf-8"))
KEY = bytes.fromhex(GOLDEN["data_key"])
NAMES = (GOLDEN["tenant"], GOLDEN["record"], GOLDEN["part"])
PLAINTEXT = GOLDEN["plaintext"].encode()


def _sealed() -> SealedPart:
    return SealedPart(*(bytes.fromhex(GOLDEN[name]) for name in ("com", "ct", "nonce", "ciphertext")))


def test_sealing_gives_the_golden_commitment_and_ciphertext() -> None:
    given = iter([bytes.fromhex(GOLDEN["r"]), bytes.fromhex(GOLDEN["nonce"])])
    assert seal(KEY, *NAMES, PLAINTEXT, lambda count: next(given)) == _sealed()


def test_the_golden_content_follows_from_the_written_definition() -> None:
    r, nonce = bytes.fromhex(GOLDEN["r"]), bytes.fromhex(GOLDEN["nonce"])
    tenant, record, part = (name.encode() for name in NAMES)
    message = b"probity/content/v1\0" + tenant + b"\0" + record + b"\0" + part + b"\0" + PLAINTEXT
    assert hmac.new(r, message, hashlib.sha256).hexdigest() == GOLDEN["com"]
    ciphertext = AESGCM(KEY).encrypt(nonce, r + PLAINTEXT, tenant + b"\0" + record + b"\0" + part)
    assert ciphertext.hex() == GOLDEN["ciphertext"]
    assert hashlib.sha256(nonce + ciphertext).hexdigest() == GOLDEN["ct"]


def test_the_golden_content_opens() -> None:
    assert open_part(KEY, *NAMES, _sealed()) == Opening(bytes.fromhex(GOLDEN["r"]), PLAINTEXT)


@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 65_537, 1_000_000])
def test_content_of_any_size_opens_to_what_was_sealed(size: int) -> None:
    plaintext = os.urandom(size)
    sealed = seal(KEY, "t", "r", "p", plaintext, os.urandom)
    assert len(sealed.ciphertext) == size + 48
    assert open_part(KEY, "t", "r", "p", sealed).plaintext == plaintext


def test_sealing_twice_shows_no_likeness() -> None:
    one, two = (seal(KEY, *NAMES, PLAINTEXT, os.urandom) for _ in range(2))
    assert not {one.com, one.ct, one.nonce, one.ciphertext} & {two.com, two.ct, two.nonce, two.ciphertext}


def test_randomness_has_the_lengths_of_the_definition() -> None:
    asked: list[int] = []

    def random(count: int) -> bytes:
        asked.append(count)
        return bytes(count)

    seal(KEY, *NAMES, PLAINTEXT, random)
    assert asked == [32, 12]


def test_no_flipped_bit_of_the_stored_bytes_goes_unseen() -> None:
    sealed = _sealed()
    for name in ("ct", "nonce", "ciphertext"):
        stored = getattr(sealed, name)
        for bit in range(8 * len(stored)):
            changed = bytearray(stored)
            changed[bit // 8] ^= 1 << (bit % 8)
            with pytest.raises(CiphertextChanged):
                open_part(KEY, *NAMES, replace(sealed, **{name: bytes(changed)}))


def test_no_flipped_bit_of_the_commitment_goes_unseen() -> None:
    sealed = _sealed()
    for bit in range(256):
        changed = bytearray(sealed.com)
        changed[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(CommitmentMismatch):
            open_part(KEY, *NAMES, replace(sealed, com=bytes(changed)))


def test_another_key_tenant_record_or_part_does_not_open_it() -> None:
    with pytest.raises(NotOpenable):
        open_part(bytes(32), *NAMES, _sealed())
    for at in range(3):
        names = [*NAMES]
        names[at] += "x"
        with pytest.raises(NotOpenable):
            open_part(KEY, *names, _sealed())


def test_a_ciphertext_swapped_with_a_recomputed_hash_does_not_open() -> None:
    other = seal(KEY, NAMES[0], "another-record", NAMES[2], b"another text", os.urandom)
    with pytest.raises(NotOpenable):
        open_part(KEY, *NAMES, replace(other, com=_sealed().com))


def test_a_text_encrypted_anew_under_the_right_key_is_caught_by_the_commitment() -> None:
    forged = seal(KEY, *NAMES, b"what was never asked", os.urandom)
    with pytest.raises(CommitmentMismatch):
        open_part(KEY, *NAMES, replace(forged, com=_sealed().com))


def test_a_ciphertext_too_short_to_hold_r_does_not_open() -> None:
    nonce = bytes(12)
    for plaintext in (b"", b"x" * 31):
        ciphertext = AESGCM(KEY).encrypt(nonce, plaintext, "\0".join(NAMES).encode())
        sealed = SealedPart(bytes(32), ciphertext_hash(nonce, ciphertext), nonce, ciphertext)
        with pytest.raises(CommitmentMismatch):
            open_part(KEY, *NAMES, sealed)


def test_a_nonce_of_another_length_is_refused_though_the_join_hashes_alike() -> None:
    sealed = _sealed()
    joined = sealed.nonce + sealed.ciphertext
    with pytest.raises(CiphertextChanged):
        check_ciphertext(sealed.ct, joined[:13], joined[13:])


def test_no_two_different_contents_share_a_commitment_by_moving_bytes_between_names() -> None:
    opening = Opening(bytes(32), b"d")
    assert len({commitment(*names, opening) for names in (("a", "b", "c"), ("ab", "c", "d"), ("a", "bc", "d"))}) == 3
    split, joined = Opening(bytes(32), b"d\0e"), Opening(bytes(32), b"de")
    assert commitment("a", "b", "c", split) != commitment("a", "b", "c", joined)
    for names in (("a\0b", "c", "d"), ("a", "b\0c", "d"), ("a", "b", "c\0d"), ("", "b", "c"), ("a", "b", "")):
        with pytest.raises(NameNotAllowed):
            commitment(*names, opening)
        with pytest.raises(NameNotAllowed):
            seal(KEY, *names, b"", os.urandom)


def test_an_opening_is_checked_without_any_key() -> None:
    opening = Opening(bytes.fromhex(GOLDEN["r"]), PLAINTEXT)
    com = bytes.fromhex(GOLDEN["com"])
    check_opening(com, *NAMES, opening)
    wrong = [
        Opening(opening.r, PLAINTEXT + b" "),
        Opening(bytes(32), PLAINTEXT),
        Opening(opening.r + b"\0", PLAINTEXT),  # HMAC pads short keys with zeros: the length must be checked
        Opening(b"", PLAINTEXT),
    ]
    for other in wrong:
        with pytest.raises(CommitmentMismatch):
            check_opening(com, *NAMES, other)


def test_neither_text_nor_blinding_is_shown_by_repr_or_error() -> None:
    opening = open_part(KEY, *NAMES, _sealed())
    with pytest.raises(ContentError) as caught:
        check_opening(bytes(32), *NAMES, opening)
    for shown in (repr(opening), repr(_sealed()), str(caught.value)):
        assert "Müller" not in shown
        assert GOLDEN["r"] not in shown
        assert "ciphertext" not in shown
