"""From a credential (a JWT) to a Principal, or one refusal.

python-jose makes the cryptography; everything around it is decided here, because by default it takes HS256 signed with
a public key, another `kid`, an absent `exp` or `aud` and an unknown `crit`, and raises errors of other libraries on
hostile headers. So: caps on size and nesting and one reading of the JSON come before any cryptography; exactly one
prebuilt public key is picked by issuer, `kid` and algorithm; the algorithm is fixed by that key, not by the header.

An application sends one credential with thousands of requests. What was verified is remembered, by its digest, with the
key that verified it: while the issuer still shows that very key, the same bytes need no second look at their signature.
Times and claims are checked every time.

A caller learns nothing but that it was refused. `Refusal` says why, for counters.

Encrypted credentials do not exist here: `jose.jwe` is never imported.

Source: RFC 7515, 7519, 8725 (best current practices); architecture.md, "Hazards".
"""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from gateway.auth import base64url
from gateway.auth.claims import ClaimRefused, Expectation, read_claims
from gateway.auth.jwks import ALGORITHMS, MAX_KID_CHARS, IssuerKeys, VerificationKey
from gateway.strict_json import MalformedJson, parse_json
from policies.request import Principal

MAX_CREDENTIAL_BYTES = 8192
MAX_HEADER_CHARS = 2048  # of the first segment
MAX_SIGNATURE_CHARS = 1366  # RSA of 8192 bits
MAX_NESTING = 8
MAX_LEEWAY_S = 60.0
MAX_REMEMBERED = 1024  # verified credentials

_COMPACT = re.compile(r"[A-Za-z0-9_-]{2,}\.[A-Za-z0-9_-]{2,}\.[A-Za-z0-9_-]{2,}")
_TYPES = frozenset({"jwt", "at+jwt", "application/at+jwt"})
# Each of these lets the sender choose the key, or change what the bytes mean.
_FORBIDDEN_HEADERS = frozenset({"crit", "jku", "jwk", "zip", "b64", "enc", "epk", "apu", "apv"})


class Refusal(StrEnum):
    """Why a credential was refused: a closed list, for counters."""

    ABSENT = "absent"
    MALFORMED = "malformed"
    HEADER = "header"
    ISSUER = "issuer"
    ALGORITHM = "algorithm"
    KEY = "key"
    SIGNATURE = "signature"
    EXPIRED = "expired"
    CLAIMS = "claims"


class CredentialRefused(Exception):
    """The credential is not accepted. Carries no part of it, and no other error as its cause."""

    def __init__(self, reason: Refusal) -> None:
        super().__init__(reason.value)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class TrustedIssuer:
    expected: Expectation
    algorithms: frozenset[str]  # ⊆ {RS256, ES256}, at least one
    keys: IssuerKeys


@dataclass(frozen=True, slots=True)
class _Parsed:
    kid: str
    algorithm: str
    claims: Mapping[str, object]  # unverified until the signature is checked
    signed: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class _Verified:
    parsed: _Parsed
    key: VerificationKey


class TokenVerifier:
    """Knows the issuers' keys, and which credentials they verified. Event loop only."""

    def __init__(self, issuers: Iterable[TrustedIssuer], clock: Callable[[], float]) -> None:
        """`clock` returns Unix seconds.

        Raises: ValueError: no issuer, two of one name, an algorithm that is not ours, a leeway above 60 s.
        """
        self._issuers: dict[str, TrustedIssuer] = {}
        self._clock = clock
        self._verified: OrderedDict[bytes, _Verified] = OrderedDict()  # by SHA-256 of the credential, oldest first
        for trusted in issuers:
            self._add(trusted)
        if not self._issuers:
            raise ValueError("at least one issuer is needed")

    def _add(self, trusted: TrustedIssuer) -> None:
        name = trusted.expected.issuer
        if name in self._issuers:
            raise ValueError(f"the issuer `{name}` is configured twice")
        if not trusted.algorithms or not trusted.algorithms <= ALGORITHMS:
            raise ValueError(f"the algorithms of `{name}` must be some of {', '.join(sorted(ALGORITHMS))}")
        if not 0 <= trusted.expected.leeway_s <= MAX_LEEWAY_S:
            raise ValueError(f"the leeway of `{name}` must be between 0 and {MAX_LEEWAY_S:.0f} s")
        self._issuers[name] = trusted

    async def verify(self, credential: bytes) -> Principal:
        """Return who the credential speaks for.

        Raises: CredentialRefused, and nothing else.
        """
        digest = hashlib.sha256(credential).digest()
        verified = self._verified.get(digest)
        parsed = _parse(credential) if verified is None else verified.parsed
        issuer = parsed.claims.get("iss")
        trusted = self._issuers.get(issuer) if isinstance(issuer, str) else None
        if trusted is None:
            raise CredentialRefused(Refusal.ISSUER)
        if parsed.algorithm not in trusted.algorithms:
            raise CredentialRefused(Refusal.ALGORITHM)
        key = await trusted.keys.find(parsed.kid, parsed.algorithm)
        if key is None:
            raise CredentialRefused(Refusal.KEY)
        # A fetched set has keys of its own, also where they are the same: a rotation is never overlooked.
        if verified is None or verified.key is not key:
            if not key.verify(parsed.signed, parsed.signature):
                raise CredentialRefused(Refusal.SIGNATURE)
            self._remember(digest, _Verified(parsed, key))
        try:
            return read_claims(parsed.claims, trusted.expected, self._clock())
        except ClaimRefused as refused:
            raise CredentialRefused(_reason_of(refused)) from None

    def _remember(self, digest: bytes, verified: _Verified) -> None:
        self._verified[digest] = verified
        if len(self._verified) > MAX_REMEMBERED:
            self._verified.popitem(last=False)

    async def check_keys(self) -> list[str]:
        """Fetch every issuer's keys that were never fetched; return the names of issuers without any. For readiness."""
        return [name for name, trusted in self._issuers.items() if not await trusted.keys.ready()]


def _reason_of(refused: ClaimRefused) -> Refusal:
    return Refusal.EXPIRED if refused.claim == "exp" else Refusal.CLAIMS


def _parse(credential: bytes) -> _Parsed:
    """Split and read a compact JWS, without trusting anything in it. Raises: CredentialRefused."""
    if len(credential) > MAX_CREDENTIAL_BYTES:
        raise CredentialRefused(Refusal.MALFORMED)
    text = credential.decode("latin-1")
    if not _COMPACT.fullmatch(text):
        raise CredentialRefused(Refusal.MALFORMED)
    head, payload, tail = text.split(".")
    if len(head) > MAX_HEADER_CHARS or len(tail) > MAX_SIGNATURE_CHARS:
        raise CredentialRefused(Refusal.MALFORMED)
    try:
        header = _json_object(head)
        claims = _json_object(payload)
        signature = base64url.decode(tail)
    except ValueError:
        raise CredentialRefused(Refusal.MALFORMED) from None
    kid, algorithm = _read_header(header)
    return _Parsed(kid, algorithm, claims, f"{head}.{payload}".encode("ascii"), signature)


def _json_object(segment: str) -> dict[str, object]:
    value = parse_json(base64url.decode(segment), max_depth=MAX_NESTING)
    if not isinstance(value, dict):
        raise MalformedJson("not an object")
    return value


def _read_header(header: Mapping[str, object]) -> tuple[str, str]:
    if any(name in _FORBIDDEN_HEADERS or name.startswith("x5") for name in header):
        raise CredentialRefused(Refusal.HEADER)
    declared_type = header.get("typ", "JWT")
    if not isinstance(declared_type, str) or declared_type.lower() not in _TYPES:
        raise CredentialRefused(Refusal.HEADER)
    algorithm, kid = header.get("alg"), header.get("kid")
    if not isinstance(algorithm, str) or algorithm not in ALGORITHMS:
        raise CredentialRefused(Refusal.ALGORITHM)
    if not isinstance(kid, str) or not 1 <= len(kid) <= MAX_KID_CHARS:
        raise CredentialRefused(Refusal.KEY)
    return kid, algorithm
