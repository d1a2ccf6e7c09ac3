"""Unpadded base64url, one text for one value.

The usual decoders skip characters they do not know and ignore left-over bits, so that many texts mean one value. Here
each but the canonical one is refused.

Source: RFC 4648 sections 3.5 and 5; RFC 7515 section 2.
"""

from __future__ import annotations

import binascii
import re

_ALPHABET = re.compile(r"[A-Za-z0-9_-]+")
_TO_STANDARD = bytes.maketrans(b"-_", b"+/")
_FROM_STANDARD = bytes.maketrans(b"+/", b"-_")


def decode(text: str) -> bytes:
    """Return the bytes that `text` encodes.

    Raises: ValueError: empty, padded, a foreign character, or not the canonical text.
    """
    if not _ALPHABET.fullmatch(text):
        raise ValueError("not base64url")
    padded = text.encode("ascii").translate(_TO_STANDARD) + b"=" * (-len(text) % 4)
    try:
        data = binascii.a2b_base64(padded)
    except binascii.Error:
        raise ValueError("not base64url") from None
    if encode(data) != text:
        raise ValueError("not canonical base64url")
    return data


def encode(data: bytes) -> str:
    return binascii.b2a_base64(data, newline=False).translate(_FROM_STANDARD).rstrip(b"=").decode("ascii")
