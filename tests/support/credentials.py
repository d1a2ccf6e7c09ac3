"""A forge of credentials: right ones, and every kind of wrong one, signed or not, down to the last byte.

The signing here is `cryptography`'s own, not the library that the gateway checks with.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from gateway.auth.claims import Expectation
from gateway.auth.jwks import FetchedSet, IssuerKeys
from gateway.auth.verifier import TokenVerifier, TrustedIssuer

ISSUER = "https://id.acme.example"
OTHER_ISSUER = "https://id.globex.example"
NOW = 1_795_000_000.0  # Unix seconds
P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551

Signer = Callable[[bytes], bytes]


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@lru_cache
def rsa_key(name: str = "first", bits: int = 2048) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65_537, bits)


@lru_cache
def ec_key(name: str = "first") -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def rs256(key: rsa.RSAPrivateKey) -> Signer:
    return lambda message: key.sign(message, padding.PKCS1v15(), hashes.SHA256())


def es256(key: ec.EllipticCurvePrivateKey) -> Signer:
    def sign(message: bytes) -> bytes:
        r, s = decode_dss_signature(key.sign(message, ec.ECDSA(hashes.SHA256())))
        return r.to_bytes(32, "big") + s.to_bytes(32, "big")

    return sign


def rsa_jwk(key: rsa.RSAPrivateKey, kid: str, **more: object) -> dict[str, object]:
    numbers = key.public_key().public_numbers()
    modulus = numbers.n.to_bytes((numbers.n.bit_length() + 7) // 8, "big")
    return {"kty": "RSA", "kid": kid, "use": "sig", "alg": "RS256", "n": b64(modulus), "e": "AQAB", **more}


def ec_jwk(key: ec.EllipticCurvePrivateKey, kid: str, **more: object) -> dict[str, object]:
    numbers = key.public_key().public_numbers()
    x, y = b64(numbers.x.to_bytes(32, "big")), b64(numbers.y.to_bytes(32, "big"))
    return {"kty": "EC", "crv": "P-256", "kid": kid, "use": "sig", "alg": "ES256", "x": x, "y": y, **more}


def jwks(*keys: Mapping[str, object]) -> bytes:
    return json.dumps({"keys": keys}).encode()


def good_claims(**changes: object) -> dict[str, Any]:
    """Return claims that are accepted at NOW; a change to `...` takes the claim away."""
    claims: dict[str, Any] = {
        "iss": ISSUER,
        "sub": "mia@acme.example",
        "aud": "probity",
        "iat": int(NOW) - 60,
        "exp": int(NOW) + 600,
        "tenant": "acme-bank",
        "roles": ["app", "contact-centre"],
        "client": "svc-crm",
        "purpose": "complaint-summary",
    }
    return {name: value for name, value in (claims | changes).items() if value is not ...}


def compact(header: bytes, payload: bytes, sign: Signer) -> str:
    signed = f"{b64(header)}.{b64(payload)}"
    return f"{signed}.{b64(sign(signed.encode()))}"


def credential(
    claims: Mapping[str, object] | None = None,
    *,
    header: Mapping[str, object] | None = None,  # changes; `...` takes a member away
    sign: Signer | None = None,
) -> str:
    """Return an RS256 credential of the first RSA key, which is good unless something is changed."""
    members = {"alg": "RS256", "typ": "JWT", "kid": "rsa-1", **(header or {})}
    kept = {name: value for name, value in members.items() if value is not ...}
    payload = json.dumps(good_claims() if claims is None else claims).encode()
    return compact(json.dumps(kept).encode(), payload, sign or rs256(rsa_key()))


def es_credential(claims: Mapping[str, object] | None = None, *, sign: Signer | None = None) -> str:
    return credential(claims, header={"alg": "ES256", "kid": "ec-1"}, sign=sign or es256(ec_key()))


def fixed_keys(data: bytes) -> IssuerKeys:
    async def fetch() -> FetchedSet:
        return FetchedSet(data)

    return IssuerKeys(fetch, lambda: 0.0)


def verifier(*, tenants: frozenset[str] = frozenset(), now: float = NOW, leeway_s: float = 30.0) -> TokenVerifier:
    """Return a verifier that trusts two issuers: ISSUER with RS256 and ES256, OTHER_ISSUER with ES256 alone."""
    first = TrustedIssuer(
        Expectation(ISSUER, "probity", tenants, leeway_s),
        frozenset({"RS256", "ES256"}),
        fixed_keys(jwks(rsa_jwk(rsa_key(), "rsa-1"), ec_jwk(ec_key(), "ec-1"))),
    )
    other = TrustedIssuer(
        Expectation(OTHER_ISSUER, "probity"),
        frozenset({"ES256"}),
        fixed_keys(jwks(ec_jwk(ec_key("other"), "ec-1"), rsa_jwk(rsa_key("other"), "rsa-1"))),
    )
    return TokenVerifier([first, other], lambda: now)
