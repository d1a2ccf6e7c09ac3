"""Content of a record: committed to in the leaf, encrypted beside it, erasable by destroying its key.

    com        = HMAC-SHA256(r, "probity/content/v1" ‖ 0 ‖ tenant ‖ 0 ‖ record ‖ 0 ‖ part ‖ 0 ‖ plaintext)
    ciphertext = AES-256-GCM(data key, nonce, r ‖ plaintext, associated data: tenant ‖ 0 ‖ record ‖ 0 ‖ part)
    ct         = SHA-256(nonce ‖ ciphertext)

‖ 0 ‖ is one zero byte. Tenant, record and part hold none, so it ends each of them, and no two different
(tenant, record, part, plaintext) are ever committed to as the same bytes. r is 32 random bytes and travels inside the
ciphertext: whoever may read the content can open the commitment, nobody else can guess at it, and when the data key
is destroyed the leaf's 32 bytes say nothing about a person. Both commitments are needed: AES-GCM does not commit to
its key, so `ct` alone would let one ciphertext be opened as two texts, and `com` alone could not be checked without
the key. One complete example stands in tests/golden/audit/content.json.

Knows no records and no database. Source: NIST SP 800-38D (AES-GCM); RFC 2104 (HMAC).
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Callable
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

# ContentError              catch this: the content is not what the leaf says, or cannot be read
# ├── NameNotAllowed        tenant, record or part is empty or holds a zero byte: the caller is wrong
# ├── CiphertextChanged     the stored ciphertext is not the one committed to
# ├── NotOpenable           the data key, or what it is said to belong to, is not this ciphertext's
# └── CommitmentMismatch    the plaintext is not the one committed to


class ContentError(ValueError):
    """Content is not what the leaf says it is, or cannot be read."""


class NameNotAllowed(ContentError):
    """A tenant, record or part is empty or holds a zero byte."""


class CiphertextChanged(ContentError):
    """The stored ciphertext is not the one that was committed to."""


class NotOpenable(ContentError):
    """The data key does not open the ciphertext under this tenant, record and part."""


class CommitmentMismatch(ContentError):
    """The plaintext is not the one that was committed to."""


DATA_KEY_BYTES = 32
NONCE_BYTES = 12
BLINDING_BYTES = 32  # r
TAG_BYTES = 16
_DOMAIN = b"probity/content/v1"

# Gives n random bytes; `os.urandom` in production.
Random = Callable[[int], bytes]
RANDOM_PAGE_BYTES = 8192


class RandomPages:
    """The system's random bytes, asked for by the page. For one thread.

    The writer draws eight times a record, the gateway twice a request. Each call of the system lets go of the
    interpreter, and on a busy gateway another thread then keeps it for milliseconds. No byte is given out twice.
    """

    def __init__(self, source: Random = os.urandom) -> None:
        self._source = source
        self._page = b""
        self._at = 0

    def __call__(self, count: int) -> bytes:
        if self._at + count > len(self._page):
            self._page, self._at = self._source(max(RANDOM_PAGE_BYTES, count)), 0
        drawn = self._page[self._at : self._at + count]
        self._at += count
        return drawn


@dataclass(frozen=True, slots=True)
class SealedPart:
    com: bytes  # 32 bytes, in the leaf
    ct: bytes  # 32 bytes, in the leaf
    nonce: bytes  # 12 bytes, beside it
    ciphertext: bytes = field(repr=False)  # 48 bytes longer than the plaintext: r and the tag


@dataclass(frozen=True, slots=True)
class Opening:
    """What opens a commitment. Never logged; `repr` shows neither member."""

    r: bytes = field(repr=False)  # 32 bytes
    plaintext: bytes = field(repr=False)


def seal(data_key: bytes, tenant: str, record: str, part: str, plaintext: bytes, random: Random) -> SealedPart:
    """Encrypt a part and commit to both the plaintext and the ciphertext.

    The nonce is random, 96 bits: one data key may seal up to 2**32 parts; ours belongs to one request.

    Raises:
        NameNotAllowed: tenant, record or part is empty or holds a zero byte.
    """
    names = _names(tenant, record, part)
    r, nonce = random(BLINDING_BYTES), random(NONCE_BYTES)
    ciphertext = AESGCM(data_key).encrypt(nonce, r + plaintext, names)
    return SealedPart(_commit(names, r, plaintext), ciphertext_hash(nonce, ciphertext), nonce, ciphertext)


def open_part(data_key: bytes, tenant: str, record: str, part: str, sealed: SealedPart) -> Opening:
    """Decrypt a part and check both commitments.

    Raises:
        CiphertextChanged: the stored bytes are not those of `ct`.
        NotOpenable: another key, tenant, record or part.
        CommitmentMismatch: the decrypted text is not that of `com`.
    """
    names = _names(tenant, record, part)
    check_ciphertext(sealed.ct, sealed.nonce, sealed.ciphertext)
    try:
        opened = AESGCM(data_key).decrypt(sealed.nonce, sealed.ciphertext, names)
    except (InvalidTag, ValueError) as error:
        raise NotOpenable(f"the part `{part}` does not open with the key it is stored with") from error
    opening = Opening(opened[:BLINDING_BYTES], opened[BLINDING_BYTES:])
    check_opening(sealed.com, tenant, record, part, opening)
    return opening


def seal_transient(data_key: bytes, tenant: str, record: str, part: str, plaintext: bytes, random: Random) -> bytes:
    """Encrypt what no leaf commits to, such as a journal row: nonce ‖ ciphertext. The cipher guards it alone."""
    nonce = random(NONCE_BYTES)
    return nonce + AESGCM(data_key).encrypt(nonce, plaintext, _names(tenant, record, part))


def open_transient(data_key: bytes, tenant: str, record: str, part: str, sealed: bytes) -> bytes:
    """Decrypt what `seal_transient` gave.

    Raises:
        NotOpenable: changed, or another key, tenant, record or part.
    """
    try:
        return AESGCM(data_key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], _names(tenant, record, part))
    except (InvalidTag, ValueError) as error:
        raise NotOpenable(f"`{part}` does not open with the key it is stored with") from error


def commitment(tenant: str, record: str, part: str, opening: Opening) -> bytes:
    """Return `com`, 32 bytes."""
    return _commit(_names(tenant, record, part), opening.r, opening.plaintext)


def ciphertext_hash(nonce: bytes, ciphertext: bytes) -> bytes:
    """Return `ct`, 32 bytes. The nonce has 12 bytes always, so the join is unambiguous."""
    return hashlib.sha256(nonce + ciphertext).digest()


def check_opening(com: bytes, tenant: str, record: str, part: str, opening: Opening) -> None:
    """Raise CommitmentMismatch unless `opening` opens `com`. Needs no key: an auditor's check."""
    if len(opening.r) != BLINDING_BYTES or not hmac.compare_digest(commitment(tenant, record, part, opening), com):
        raise CommitmentMismatch(f"the content of part `{part}` is not what the leaf commits to")


def check_ciphertext(ct: bytes, nonce: bytes, ciphertext: bytes) -> None:
    """Raise CiphertextChanged unless the stored bytes are those of `ct`."""
    if len(nonce) != NONCE_BYTES or not hmac.compare_digest(ciphertext_hash(nonce, ciphertext), ct):
        raise CiphertextChanged("the stored ciphertext is not what the leaf commits to")


def _names(tenant: str, record: str, part: str) -> bytes:
    if not tenant or not record or not part or "\0" in tenant or "\0" in record or "\0" in part:
        raise NameNotAllowed("a tenant, record or part is not empty and holds no zero byte")
    return f"{tenant}\0{record}\0{part}".encode()


def _commit(names: bytes, r: bytes, plaintext: bytes) -> bytes:
    # Not `hmac.digest`: that lets go of the interpreter even for a few bytes; see `RandomPages`.
    return hmac.new(r, b"\0".join((_DOMAIN, names, plaintext)), "sha256").digest()
