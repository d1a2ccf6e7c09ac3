"""The public keys of an issuer: read strictly from a JSON Web Key Set, cached, rotated.

Only RSA of 2048 bits or more and P-256 are taken. A set that shows a private or a symmetric member, a weak key or two
keys of one name is refused whole: whoever publishes such a set has lost control of it. Public keys of other kinds or
uses stand in many real sets and are passed over.

    {"keys":[{"kty":"EC","crv":"P-256","kid":"2026-11","use":"sig","alg":"ES256",
      "x":"MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4","y":"4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM"}]}

Knows nothing of credentials.

Source: RFC 7517; RFC 7518 sections 3.3, 3.4, 6; NIST SP 800-131A (2048 bits).
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from jose import jwk
from jose.exceptions import JOSEError

from gateway.auth import base64url
from gateway.strict_json import MalformedJson, parse_json

ALGORITHMS = frozenset({"RS256", "ES256"})

MAX_JWKS_BYTES = 65_536
MAX_KEYS = 32
MAX_KID_CHARS = 256
MIN_RSA_BITS = 2048
MAX_RSA_BITS = 8192  # a larger modulus only costs the one who checks
P256_COORDINATE_BYTES = 32

MIN_CACHE_S = 300.0
MAX_CACHE_S = 900.0
DEFAULT_CACHE_S = 600.0
REFETCH_INTERVAL_S = 30.0  # between two fetches that an unknown `kid` or a failure asks for
STALE_LIMIT_S = 3600.0  # keys older than this are forgotten, whatever the reason that no newer ones came
FETCH_TIMEOUT_S = 5.0

_MAX_AGE = re.compile(r"(?:^|[,\s])max-age=(\d{1,9})(?:$|[,\s])")
_SECRET_MEMBERS = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "k", "priv"})
_EXPONENTS = range(65_537, 2**32, 2)


class JwksError(Exception):
    """Base of what reading a key set raises. Messages never contain key material.

    JwksError
    ├── JwksRefused      the set was read and breaks a rule
    └── JwksUnavailable  the set could not be read
    """


class JwksRefused(JwksError):
    pass


class JwksUnavailable(JwksError):
    pass


@dataclass(frozen=True, slots=True)
class VerificationKey:
    kid: str
    algorithm: str  # RS256 | ES256
    signature_bytes: int  # exact length of every signature this key makes
    key: Any  # a public key of python-jose, built once

    def verify(self, message: bytes, signature: bytes) -> bool:
        if len(signature) != self.signature_bytes:
            return False
        try:
            return bool(self.key.verify(message, signature))
        except Exception:  # the backend's errors are many and mean one thing here
            return False


KeySet = Mapping[tuple[str, str], VerificationKey]  # by (kid, algorithm)


@dataclass(frozen=True, slots=True)
class FetchedSet:
    data: bytes
    cache_s: float = DEFAULT_CACHE_S


Fetch = Callable[[], Awaitable[FetchedSet]]


# --- reading a set ---


def parse_jwks(data: bytes) -> KeySet:
    """Return the usable keys of a key set. Raises: JwksRefused."""
    if len(data) > MAX_JWKS_BYTES:
        raise JwksRefused(f"the key set is larger than {MAX_JWKS_BYTES} bytes")
    try:
        document = parse_json(data, max_depth=6)
    except MalformedJson as error:
        raise JwksRefused(f"the key set is {error}") from None
    entries = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(entries, list) or len(entries) > MAX_KEYS:
        raise JwksRefused(f"`keys` must be a list of at most {MAX_KEYS} keys")
    keys: dict[tuple[str, str], VerificationKey] = {}
    for entry in entries:
        key = _read_key(entry)
        if key is None:
            continue
        if (key.kid, key.algorithm) in keys:
            raise JwksRefused("two keys share one `kid`")
        keys[key.kid, key.algorithm] = key
    return keys


def _read_key(entry: object) -> VerificationKey | None:
    """Return the key, or None where it is a public key for another use."""
    if not isinstance(entry, dict):
        raise JwksRefused("a key is not an object")
    if _SECRET_MEMBERS & entry.keys() or entry.get("kty") == "oct":
        raise JwksRefused("the set shows a private or a symmetric key")
    kid = entry.get("kid")
    if not isinstance(kid, str) or not 1 <= len(kid) <= MAX_KID_CHARS or not _is_for_signatures(entry):
        return None
    if entry.get("kty") == "RSA" and entry.get("alg", "RS256") == "RS256":
        return _rsa_key(kid, entry)
    if entry.get("kty") == "EC" and entry.get("crv") == "P-256" and entry.get("alg", "ES256") == "ES256":
        return _p256_key(kid, entry)
    return None


def _is_for_signatures(entry: Mapping[str, object]) -> bool:
    operations = entry.get("key_ops", ["verify"])
    return entry.get("use", "sig") == "sig" and isinstance(operations, list) and "verify" in operations


def _rsa_key(kid: str, entry: Mapping[str, object]) -> VerificationKey:
    modulus, exponent = _member(entry, "n"), _member(entry, "e")
    bits = int.from_bytes(modulus, "big").bit_length()
    if not MIN_RSA_BITS <= bits <= MAX_RSA_BITS:
        raise JwksRefused(f"an RSA key has {bits} bits; between {MIN_RSA_BITS} and {MAX_RSA_BITS} are taken")
    if int.from_bytes(exponent, "big") not in _EXPONENTS:
        raise JwksRefused("an RSA key has an exponent that is not odd, below 65537 or above 2**32")
    members = {"kty": "RSA", "n": base64url.encode(modulus), "e": base64url.encode(exponent)}
    return VerificationKey(kid, "RS256", (bits + 7) // 8, _construct(members, "RS256"))


def _p256_key(kid: str, entry: Mapping[str, object]) -> VerificationKey:
    x, y = _member(entry, "x"), _member(entry, "y")
    if len(x) != P256_COORDINATE_BYTES or len(y) != P256_COORDINATE_BYTES:
        raise JwksRefused("a P-256 key has coordinates that are not 32 bytes")
    members = {"kty": "EC", "crv": "P-256", "x": base64url.encode(x), "y": base64url.encode(y)}
    return VerificationKey(kid, "ES256", 2 * P256_COORDINATE_BYTES, _construct(members, "ES256"))


def _member(entry: Mapping[str, object], name: str) -> bytes:
    text = entry.get(name)
    try:
        return base64url.decode(text if isinstance(text, str) else "")
    except ValueError:
        raise JwksRefused(f"the member `{name}` of a key is not base64url") from None


def _construct(members: Mapping[str, str], algorithm: str) -> Any:
    try:
        return jwk.construct(dict(members), algorithm)
    except (JOSEError, ValueError):  # e.g. a point that is not on the curve
        raise JwksRefused("a key is not a valid public key") from None


# --- where a set comes from ---


def from_file(path: Path) -> Fetch:
    """Return a fetch that reads `path`. The file is small and local: it is read on the event loop."""

    async def fetch() -> FetchedSet:
        try:
            with path.open("rb") as file:
                return FetchedSet(file.read(MAX_JWKS_BYTES + 1))
        except OSError:
            raise JwksUnavailable("the key set file cannot be read") from None

    return fetch


def from_url(url: str, client: httpx.AsyncClient) -> Fetch:
    """Return a fetch that asks `url`. Redirects and compressed answers are refused; the size is capped."""

    async def fetch() -> FetchedSet:
        try:
            async with asyncio.timeout(FETCH_TIMEOUT_S):
                return await _get(url, client)
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError):
            raise JwksUnavailable("the key set cannot be fetched") from None

    return fetch


async def _get(url: str, client: httpx.AsyncClient) -> FetchedSet:
    headers = {"accept": "application/json", "accept-encoding": "identity"}
    async with client.stream("GET", url, headers=headers, follow_redirects=False) as response:
        if response.status_code != 200 or response.headers.get("content-encoding", "identity") != "identity":
            raise JwksUnavailable("the key set was answered with another status or encoding")
        data = bytearray()
        async for chunk in response.aiter_raw(8192):
            data += chunk
            if len(data) > MAX_JWKS_BYTES:
                raise JwksUnavailable(f"the key set is larger than {MAX_JWKS_BYTES} bytes")
        return FetchedSet(bytes(data), _cache_seconds(response.headers.get("cache-control", "")))


def _cache_seconds(cache_control: str) -> float:
    """Return the issuer's wish within the bounds of the contract: 5 to 15 minutes."""
    match = _MAX_AGE.search(cache_control.lower())
    wish = float(match.group(1)) if match else DEFAULT_CACHE_S
    return min(max(wish, MIN_CACHE_S), MAX_CACHE_S)


# --- the cache ---


class IssuerKeys:
    """The keys of one issuer, as fresh as the contract asks. Event loop only.

    Fetched at most once per `REFETCH_INTERVAL_S` beyond the cache's own rhythm, however many unknown `kid`s arrive.
    When the issuer cannot be reached, the last good keys serve until they are `STALE_LIMIT_S` old, and no longer.
    """

    def __init__(self, fetch: Fetch, monotonic: Callable[[], float]) -> None:
        self._fetch = fetch
        self._monotonic = monotonic
        self._keys: KeySet = {}
        self._fetched_at: float | None = None  # of `_keys`
        self._fresh_until = -math.inf
        self._next_try = -math.inf  # no fetch before it
        self._fetching: asyncio.Task[None] | None = None
        self.last_error: JwksError | None = None  # of the newest attempt, for readiness

    async def find(self, kid: str, algorithm: str) -> VerificationKey | None:
        """Return the one key of this name, or None when the issuer has none or cannot be reached."""
        key = self._known(kid, algorithm)
        if key is not None and self._monotonic() < self._fresh_until:
            return key
        if self._may_fetch():
            await self.refresh()
        return self._known(kid, algorithm)

    async def ready(self) -> bool:
        """Return whether there are keys that may be used, after trying to get some."""
        if self._monotonic() >= self._fresh_until and self._may_fetch():
            await self.refresh()
        return bool(self._keys) and self._usable()

    async def refresh(self) -> None:
        """Fetch now, or join the fetch in flight. Failures end in `last_error`; the keys then stay as they are."""
        if self._fetching is None:
            self._fetching = asyncio.get_running_loop().create_task(self._refresh())
        # Shielded: one caller who goes away must not take the fetch from the others.
        await asyncio.shield(self._fetching)

    def _known(self, kid: str, algorithm: str) -> VerificationKey | None:
        return self._keys.get((kid, algorithm)) if self._usable() else None

    def _usable(self) -> bool:
        return self._fetched_at is not None and self._monotonic() - self._fetched_at <= STALE_LIMIT_S

    def _may_fetch(self) -> bool:
        return self._fetching is not None or self._monotonic() >= self._next_try

    async def _refresh(self) -> None:
        try:
            fetched = await self._fetch()
            self._keys = parse_jwks(fetched.data)
            self._fetched_at = self._monotonic()
            self._fresh_until = self._fetched_at + fetched.cache_s
            self.last_error = None
        except JwksError as error:
            self.last_error = error
        except Exception:  # a resolver, a proxy, a certificate store: an issuer out of reach is never our failure
            self.last_error = JwksUnavailable("the key set cannot be fetched")
        finally:
            self._next_try = self._monotonic() + REFETCH_INTERVAL_S
            self._fetching = None
