"""Signed notes: a text, a blank line, and lines that sign it. Knows Ed25519 and nothing of trees.

One complete note, by the key `probity.example/acme-bank` whose verifier key is the line below it (wrapped here, each is
one line; both stand in tests/golden/audit/):

    probity.example/acme-bank
    8
    XcnaeacGWamtVZy3Ad7ZoqudgjqtL0lgz+Nw7/RgQyg=

    — probity.example/acme-bank mBPDc//UQXXsVEUQ3Y7ThOLF6WZVKCbRG+hiXkveZlFu8WD26QI1q0h0jNt31v5b5BBOuMIEsuhEbST+r5H9
      FR+kRQY=

    probity.example/acme-bank+9813c373+AQOhB7/zzhC+HXDdGOdLwJln5NYwm6UNXx3chmQSVTG4

The base64 of a signature line holds 4 bytes of key id and 64 of signature; that of a verifier key the byte 0x01 and 32
bytes of public key.

Three traps of the format: the text may hold blank lines, and ends at the *last* one; base64 uses `+`, so a verifier key
splits at its first two `+` only; ours may be any of several signatures, and unknown ones say nothing.

Source: C2SP signed-note v1 (c2sp.org/signed-note); RFC 8032 (Ed25519).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

# NoteError              catch this
# ├── NoteMalformed      the bytes are not a signed note
# ├── VerifierMalformed  the text is not a verifier key, or a name cannot be a key's name
# ├── SignatureWrong     a key we know is said to have signed this, and has not
# └── NotSigned          no key we know has signed this


class NoteError(ValueError):
    """A signed note, or a key of one, is refused."""


class NoteMalformed(NoteError):
    """The text is not a signed note."""


class VerifierMalformed(NoteError):
    """The text is not a verifier key, or its name is not allowed."""


class SignatureWrong(NoteError):
    """A signature names a known key and does not verify."""


class NotSigned(NoteError):
    """No known key has signed the note."""


MAX_NOTE_BYTES = 1_000_000
MAX_SIGNATURES = 64
ED25519 = b"\x01"  # the signature type of a plain Ed25519 note signature
PUBLIC_KEY_BYTES = 32
KEY_ID_BYTES = 4
MARK = "\u2014 "  # em dash, space: how a signature line begins


@dataclass(frozen=True, slots=True)
class Verifier:
    """A public key and the name it signs under."""

    name: str
    public_key: bytes  # 32 bytes, RFC 8032

    def __post_init__(self) -> None:
        _check_name(self.name)
        if len(self.public_key) != PUBLIC_KEY_BYTES:
            raise VerifierMalformed("an Ed25519 public key has 32 bytes")

    @property
    def key_id(self) -> bytes:
        """Return the 4 bytes that, with the name, say which key signed."""
        material = self.name.encode() + b"\n" + ED25519 + self.public_key
        return hashlib.sha256(material).digest()[:KEY_ID_BYTES]

    @classmethod
    def parse(cls, text: str) -> Verifier:
        """Read `name+key id+base64`, the form `str()` gives.

        Raises:
            VerifierMalformed: it is not of that form, or the key id is not this key's.
        """
        parts = text.split("+", 2)  # the base64 part may itself hold `+`
        if len(parts) != 3:
            raise VerifierMalformed("a verifier key has the form `name+key id+base64`")
        name, key_id, encoded = parts
        key = _decode(encoded)
        if key is None or key[:1] != ED25519:
            raise VerifierMalformed("a verifier key ends in the base64 of 0x01 and an Ed25519 public key")
        verifier = cls(name, key[1:])
        if key_id != verifier.key_id.hex():
            raise VerifierMalformed("the key id of a verifier key does not belong to its name and key")
        return verifier

    def __str__(self) -> str:
        return f"{self.name}+{self.key_id.hex()}+{_encode(ED25519 + self.public_key)}"

    def check(self, text: str, signature: bytes) -> None:
        """Raise SignatureWrong unless `signature` (64 bytes) is this key's over `text`."""
        try:
            Ed25519PublicKey.from_public_bytes(self.public_key).verify(signature, text.encode())
        except (InvalidSignature, ValueError) as error:
            raise SignatureWrong(f"the signature of `{self.name}` does not fit the note") from error


@dataclass(frozen=True, slots=True)
class Signer:
    """A private key and the name it signs under. The key is not shown by `repr`."""

    name: str
    private_key: Ed25519PrivateKey

    def __post_init__(self) -> None:
        _check_name(self.name)

    @property
    def verifier(self) -> Verifier:
        return Verifier(self.name, self.private_key.public_key().public_bytes_raw())

    def line(self, text: str) -> str:
        """Return this key's signature line under `text`, with its newline."""
        _check_text(text)
        signature = self.private_key.sign(text.encode())
        return f"{MARK}{self.name} {_encode(self.verifier.key_id + signature)}\n"


@dataclass(frozen=True, slots=True)
class Note:
    """A note whose signatures have been checked."""

    text: str  # ends in a newline
    signed_by: tuple[Verifier, ...]  # the known keys that signed, each once, in the order of their lines


def sign_note(text: str, signers: Sequence[Signer]) -> str:
    """Return the note of `text` signed by each of `signers`, in their order.

    Raises:
        NoteMalformed: the text does not end in a newline, or holds a control character.
    """
    _check_text(text)
    return text + "\n" + "".join(signer.line(text) for signer in signers)


def note_text(note: str) -> str:
    """Return the text of a note, its signatures unread: trust nothing it says before `open_note`."""
    return _split(note)[0]


def open_note(note: str, verifiers: Iterable[Verifier]) -> Note:
    """Return the text of `note` and who of `verifiers` signed it: at least one.

    Raises:
        NoteMalformed: not a signed note.
        SignatureWrong: a signature names a known key and does not verify. The whole note is refused.
        NotSigned: none of `verifiers` signed.
    """
    text, lines = _split(note)
    known = {(verifier.name, verifier.key_id): verifier for verifier in verifiers}
    signed_by: dict[Verifier, None] = {}
    for name, key_id, signature in map(_signature, lines):
        verifier = known.get((name, key_id))
        if verifier is not None:
            verifier.check(text, signature)
            signed_by[verifier] = None
    if not signed_by:
        raise NotSigned("the note is not signed by any key that is trusted for it")
    return Note(text, tuple(signed_by))


def _split(note: str) -> tuple[str, list[str]]:
    if len(note) > MAX_NOTE_BYTES:
        raise NoteMalformed(f"the note is longer than {MAX_NOTE_BYTES} bytes")
    _check_characters(note)
    blank = note.rfind("\n\n")
    if blank < 0 or not note.endswith("\n"):
        raise NoteMalformed("a note is a text, a blank line, and signature lines that end in a newline")
    lines = note[blank + 2 : -1].split("\n") if note[blank + 2 :] else []
    if not 1 <= len(lines) <= MAX_SIGNATURES:
        raise NoteMalformed(f"a note has 1 to {MAX_SIGNATURES} signature lines")
    return note[: blank + 1], lines


def _signature(line: str) -> tuple[str, bytes, bytes]:
    """Return (name, key id, signature) of a signature line."""
    name, space, encoded = line.removeprefix(MARK).partition(" ")
    decoded = _decode(encoded)
    if not line.startswith(MARK) or not space or decoded is None or len(decoded) <= KEY_ID_BYTES:
        raise NoteMalformed("a signature line has the form `— name base64`")
    if not _name_allowed(name):
        raise NoteMalformed("a signature line bears a name that no key may have")
    return name, decoded[:KEY_ID_BYTES], decoded[KEY_ID_BYTES:]


def _check_text(text: str) -> None:
    if not text.endswith("\n"):
        raise NoteMalformed("the text of a note ends in a newline")
    _check_characters(text)


def _check_characters(text: str) -> None:
    if any(character < " " and character != "\n" for character in text):
        raise NoteMalformed("a note holds no control character other than newline")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise NoteMalformed("a note is valid UTF-8") from error


def _name_allowed(name: str) -> bool:
    return bool(name) and "+" not in name and not any(c.isspace() or c < " " for c in name)


def _check_name(name: str) -> None:
    if not _name_allowed(name):
        raise VerifierMalformed("a key's name is not empty and holds no space, plus or control character")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise VerifierMalformed("a key's name is valid UTF-8") from error


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _decode(text: str) -> bytes | None:
    """Return the bytes, or None unless `text` is the one standard base64 encoding of them."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    return data if _encode(data) == text else None
