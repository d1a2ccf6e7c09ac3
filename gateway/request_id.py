"""UUIDv7: the request id, sortable by time.

Layout (RFC 9562, 5.7): 48 bits of Unix milliseconds, version 7, 12 random bits, variant, 62 random bits. One example:
`0193f0c2-5b3e-7d41-9a77-c31f0e8a5b12`.
"""

from __future__ import annotations

import uuid


def uuid7(unix_ms: int, random_bytes: bytes) -> str:
    """Return the UUIDv7 of a moment (0 ≤ unix_ms < 2**48) and ten random bytes."""
    if not 0 <= unix_ms < 1 << 48 or len(random_bytes) != 10:
        raise ValueError("`unix_ms` must fit 48 bits and `random_bytes` be ten bytes")
    noise = int.from_bytes(random_bytes, "big")
    value = unix_ms << 80 | 0x7 << 76 | (noise >> 62 & 0xFFF) << 64 | 0b10 << 62 | noise & (1 << 62) - 1
    return str(uuid.UUID(int=value))
