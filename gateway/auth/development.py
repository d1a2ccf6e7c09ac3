"""The development issuer: signs credentials for the embedded default, so that two commands are enough to try things.

Its key lies in the data directory and is readable by its owner alone: whoever can read it can be anyone. It is trusted
only while no other issuer is configured.

Source: RFC 7638 (the `kid` is the thumbprint of the key).
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import orjson
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from jose import jwk, jws

from gateway.auth import base64url
from gateway.auth.claims import Expectation, read_claims
from gateway.auth.jwks import P256_COORDINATE_BYTES, Fetch, FetchedSet

ISSUER = "https://development.probity.invalid"
AUDIENCE = "probity"
KEY_FILE = "development-issuer.pem"
MAX_TTL_S = 30 * 86_400


class DevelopmentKeyUnsafe(Exception):
    """The key file cannot be used: its mode lets others read it, or it is not a P-256 key."""


class DevelopmentIssuer:
    def __init__(self, key: ec.EllipticCurvePrivateKey, clock: Callable[[], float]) -> None:
        """`clock` returns Unix seconds."""
        self._clock = clock
        self._signing_key = jwk.construct(_pem(key).decode("ascii"), "ES256")
        self._public_members = _public_members(key)
        self.kid = _thumbprint(self._public_members)

    @classmethod
    def open(cls, data_dir: Path, clock: Callable[[], float]) -> DevelopmentIssuer:
        """Return the issuer of `data_dir`; its key is made the first time. Raises: DevelopmentKeyUnsafe."""
        path = data_dir / KEY_FILE
        if not path.exists():
            data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            _create_key(path)
        return cls(_load_key(path), clock)

    def issue(
        self,
        *,
        tenant: str,
        roles: Iterable[str],
        subject: str,
        client: str | None = None,
        purpose: str | None = None,
        ttl_s: int = 3600,  # 1 … 2,592,000 (30 days)
    ) -> str:
        """Return a credential that the verifier accepts for `ttl_s` seconds.

        Raises: ClaimRefused: a value that the verifier would refuse. ValueError: `ttl_s` is out of range.
        """
        if not 1 <= ttl_s <= MAX_TTL_S:
            raise ValueError(f"`ttl` must be between 1 and {MAX_TTL_S} seconds")
        now = int(self._clock())
        claims: dict[str, object] = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": subject,
            "iat": now,
            "exp": now + ttl_s,
            "tenant": tenant,
            "roles": sorted(set(roles)),
        }
        claims |= {name: value for name, value in (("client", client), ("purpose", purpose)) if value is not None}
        read_claims(claims, self.expected, now)
        return str(jws.sign(claims, self._signing_key, headers={"kid": self.kid}, algorithm="ES256"))

    @property
    def expected(self) -> Expectation:
        return Expectation(issuer=ISSUER, audience=AUDIENCE)

    def jwks(self) -> bytes:
        key = {**self._public_members, "kid": self.kid, "use": "sig", "alg": "ES256"}
        return orjson.dumps({"keys": [key]})

    def fetch(self) -> Fetch:
        """Return a fetch of this issuer's own key set, for `IssuerKeys`."""

        async def fetch() -> FetchedSet:
            return FetchedSet(self.jwks())

        return fetch


def _create_key(path: Path) -> None:
    """Write a new key under another name and move it in place: a crash leaves no half key, a race one winner."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(_pem(ec.generate_private_key(ec.SECP256R1())))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, path)
        except FileExistsError:
            return  # another process was first; its key is the one
    finally:
        draft.unlink(missing_ok=True)


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise DevelopmentKeyUnsafe(f"`{path.name}` can be read by others (mode {mode:04o}); `chmod 600` it")
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError):
        raise DevelopmentKeyUnsafe(f"`{path.name}` is not a key; move it away to get a new one") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise DevelopmentKeyUnsafe(f"`{path.name}` is not a P-256 key; move it away to get a new one")
    return key


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _public_members(key: ec.EllipticCurvePrivateKey) -> Mapping[str, str]:
    numbers = key.public_key().public_numbers()
    x, y = (base64url.encode(number.to_bytes(P256_COORDINATE_BYTES, "big")) for number in (numbers.x, numbers.y))
    return {"crv": "P-256", "kty": "EC", "x": x, "y": y}


def _thumbprint(members: Mapping[str, str]) -> str:
    canonical = orjson.dumps(dict(members), option=orjson.OPT_SORT_KEYS)
    return base64url.encode(hashlib.sha256(canonical).digest())
