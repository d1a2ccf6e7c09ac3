"""UUIDv7: an id that sorts by time (RFC 9562, 5.7). One example: `0193f0c2-5b3e-7d41-9a77-c31f0e8a5b12`.

Layout: 48 bits of Unix milliseconds, version 7, 12 random bits, variant, 62 random bits.
"""

from __future__ import annotations

NOISE_BYTES = 10


def uuid7(unix_ms: int, noise: bytes) -> str:
    """Return the UUIDv7 of a moment (0 ≤ unix_ms < 2**48) and ten random bytes."""
    if not 0 <= unix_ms < 1 << 48 or len(noise) != NOISE_BYTES:
        raise ValueError(f"`unix_ms` must fit 48 bits and `noise` be {NOISE_BYTES} bytes")
    bits = int.from_bytes(noise, "big")
    value = unix_ms << 80 | 0x7 << 76 | (bits >> 62 & 0xFFF) << 64 | 0b10 << 62 | bits & (1 << 62) - 1
    digits = f"{value:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"
