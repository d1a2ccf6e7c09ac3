"""Credentials: the right ones are read, and every wrong one gets one constant answer.

Each hostile case goes through the ASGI middleware, because the promise is about what a caller sees: the same 401, byte
for byte, before the body is read, and never a 500.
"""

from __future__ import annotations

import hmac
import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import Message, Receive, Scope, Send

from gateway import errors
from gateway.auth.authentication import Authentication
from gateway.auth.claims import Expectation
from gateway.auth.jwks import FetchedSet, IssuerKeys
from gateway.auth.verifier import (
    MAX_CREDENTIAL_BYTES,
    MAX_REMEMBERED,
    CredentialRefused,
    Refusal,
    TokenVerifier,
    TrustedIssuer,
)
from policies.request import Principal
from tests.support.credentials import (
    ISSUER,
    NOW,
    OTHER_ISSUER,
    P256_ORDER,
    Signer,
    b64,
    compact,
    credential,
    ec_key,
    es256,
    es_credential,
    fixed_keys,
    good_claims,
    jwks,
    rs256,
    rsa_jwk,
    rsa_key,
    verifier,
)

Headers = list[tuple[bytes, bytes]]


class Inner:
    """The application behind: remembers who came through."""

    def __init__(self) -> None:
        self.principals: list[Principal | None] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.principals.append(scope.get("state", {}).get("principal"))
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})


async def ask(
    headers: Headers, *, path: str = "/v1/chat/completions", by: TokenVerifier | None = None
) -> tuple[Inner, list[Message]]:
    """Send one request through the middleware. Reading the body is a failure of the test."""
    inner, sent = Inner(), []
    app = Authentication(inner, by or verifier(), frozenset({"/livez"}))

    async def receive() -> Message:
        raise AssertionError("the body was read before the credential was accepted")

    async def send(message: Message) -> None:
        sent.append(message)

    await app({"type": "http", "method": "POST", "path": path, "headers": headers}, receive, send)
    return inner, sent


def bearer(token: str | bytes) -> Headers:
    return [(b"authorization", b"Bearer " + (token if isinstance(token, bytes) else token.encode()))]


def assert_refused(inner: Inner, sent: list[Message]) -> None:
    expected = errors.invalid_api_key()
    assert inner.principals == []
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[0]["status"] == 401
    assert sorted(sent[0]["headers"]) == [
        (b"content-length", str(len(expected.openai_body)).encode()),
        (b"content-type", b"application/json"),
        (b"www-authenticate", b'Bearer realm="probity"'),
    ]
    assert sent[1]["body"] == expected.openai_body


# --- what is accepted ---


@pytest.mark.parametrize("token", [credential(), es_credential()], ids=["RS256", "ES256"])
async def test_a_good_credential_becomes_a_principal(token: str) -> None:
    inner, sent = await ask(bearer(token))
    assert sent[0]["status"] == 204
    assert inner.principals == [
        Principal(
            issuer=ISSUER,
            subject="mia@acme.example",
            tenant="acme-bank",
            roles=frozenset({"app", "contact-centre"}),
            client="svc-crm",
            purpose="complaint-summary",
        )
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"aud": ["other", "probity"]},
        {"client": ..., "purpose": ...},
        {"client": None},
        {"tenant": "*"},
        {"exp": NOW + 0.5},
        {"exp": NOW - 29},  # within the leeway
        {"iat": NOW + 29},
        {"nbf": NOW + 29},
        {"nbf": 0},
        {"sub": "Zoë 🦉"},
        {"sub": "x" * 256},
        {"unknown": {"deep": [1, 2, {"er": None}]}},
        {"unknown": [[[[[[[]]]]]]]},
    ],
)
async def test_claims_at_the_edge_of_what_is_allowed_are_accepted(changes: dict[str, object]) -> None:
    _, sent = await ask(bearer(credential(good_claims(**changes))))
    assert sent[0]["status"] == 204


@pytest.mark.parametrize("header", [{"typ": ...}, {"typ": "at+jwt"}, {"typ": "jwt"}, {"nonce": "abc"}, {"cty": "JWT"}])
async def test_headers_that_mean_nothing_to_us_are_accepted(header: dict[str, object]) -> None:
    _, sent = await ask(bearer(credential(header=header)))
    assert sent[0]["status"] == 204


async def test_the_scheme_is_read_in_any_case() -> None:
    _, sent = await ask([(b"authorization", b"bEARER  " + credential().encode())])
    assert sent[0]["status"] == 204


async def test_the_twin_of_an_es256_signature_says_the_same_and_no_more() -> None:
    """(r, n − s) verifies wherever (r, s) does. It is the same statement: nothing here is keyed by the signature."""

    def twin(message: bytes) -> bytes:
        raw = es256(ec_key())(message)
        return raw[:32] + (P256_ORDER - int.from_bytes(raw[32:], "big")).to_bytes(32, "big")

    inner, _ = await ask(bearer(es_credential(sign=twin)))
    original, _ = await ask(bearer(es_credential()))
    assert inner.principals == original.principals


# --- what is refused ---


def public_pem() -> bytes:
    return (
        rsa_key().public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )


def public_der() -> bytes:
    return (
        rsa_key().public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    )


def hs256(secret: bytes) -> Signer:
    return lambda message: hmac.digest(secret, message, "sha256")


def pss(message: bytes) -> bytes:
    return rsa_key().sign(message, padding.PSS(padding.MGF1(hashes.SHA256()), 32), hashes.SHA256())


def der_signature(message: bytes) -> bytes:
    return ec_key().sign(message, ec.ECDSA(hashes.SHA256()))


def raw(header: str, payload: str | None = None, sign: Signer | None = None) -> str:
    body = json.dumps(good_claims()) if payload is None else payload
    return compact(
        header.encode("utf-8", "surrogatepass"), body.encode("utf-8", "surrogatepass"), sign or rs256(rsa_key())
    )


GOOD_HEADER = '{"alg":"RS256","kid":"rsa-1"}'


def claims_text(**replacements: str) -> str:
    """Return the good claims as JSON text with members written exactly as given."""
    members = {name: json.dumps(value) for name, value in good_claims().items()} | replacements
    return "{" + ",".join(f"{json.dumps(name)}:{value}" for name, value in members.items()) + "}"


def hostile_headers() -> Iterator[tuple[str, str]]:
    for alg in ("none", "None", "nOnE", "", "HS256", "RS384", "PS256", "ES384", "EdDSA", "RS256 ", "rs256", "RSA-OAEP"):
        yield f"alg {alg!r}", credential(header={"alg": alg})
    for value in (None, 1, True, ["RS256"], {"alg": "RS256"}):
        yield f"alg {value!r}", credential(header={"alg": value})
    yield "alg missing", credential(header={"alg": ...})
    yield "alg none, no signature", credential(header={"alg": "none"}, sign=lambda _: b"").rstrip(".") + "."
    yield "HS256 with the public key as PEM", credential(header={"alg": "HS256"}, sign=hs256(public_pem()))
    yield "HS256 with the public key as DER", credential(header={"alg": "HS256"}, sign=hs256(public_der()))
    yield "RS256 in name, HMAC with the PEM in truth", credential(sign=hs256(public_pem()))
    yield "kid of another kind of key", credential(header={"kid": "ec-1"})
    yield "kid unknown", credential(header={"kid": "rsa-2"})
    for kid in (..., None, "", 1, ["rsa-1"], {"kid": "rsa-1"}, "k" * 257, "rsa-1\u0000", "../../etc/passwd"):
        yield f"kid {str(kid)[:20]!r}", credential(header={"kid": kid})
    for name in ("jku", "x5u", "x5c", "x5t", "x5t#S256", "x5anything", "zip", "b64", "enc", "epk"):
        yield f"header {name}", credential(header={name: "https://evil.example/keys"})
    yield "header jwk", credential(header={"jwk": rsa_jwk(rsa_key("evil"), "rsa-1")}, sign=rs256(rsa_key("evil")))
    yield "crit unknown", credential(header={"crit": ["exp"], "exp": 1})
    yield "crit empty", credential(header={"crit": []})
    for typ in ("logout+jwt", "dpop+jwt", "", 5, None, ["JWT"]):
        yield f"typ {typ!r}", credential(header={"typ": typ})
    yield "header alg twice", raw('{"alg":"none","alg":"RS256","kid":"rsa-1"}')
    yield "header kid twice", raw('{"alg":"RS256","kid":"x","\\u006bid":"rsa-1"}')
    yield "header deep", raw(GOOD_HEADER[:-1] + ',"x":' + "[" * 500 + "]" * 500 + "}")
    yield "header a list", raw('["RS256"]')
    yield "header a string", raw('"RS256"')
    yield "header null", raw("null")
    yield "header not JSON", raw("{alg:RS256}")
    yield "header with NaN", raw(GOOD_HEADER[:-1] + ',"x":NaN}')
    yield "header half a surrogate", raw(GOOD_HEADER[:-1] + ',"x":"\\ud800"}')
    yield "header long", credential(header={"pad": "x" * 3000})


def hostile_claims() -> Iterator[tuple[str, str]]:
    def changed(name: str, value: object) -> tuple[str, str]:
        return f"{name} = {str(value)[:24]!r}", credential(good_claims(**{name: value}))

    for name in ("iss", "sub", "aud", "exp", "iat", "tenant", "roles"):
        yield changed(name, ...)
        for value in (None, True, [], {}, "", [None], [["app"]], {"app": 1}):
            yield changed(name, value)
    for iss in ("https://id.acme.example/", "https://evil.example", [ISSUER], ISSUER.upper(), 1):
        yield changed("iss", iss)
    for aud in (
        "Probity",
        "probity ",
        ["other"],
        ["probity", 1],
        [["probity"]],
        {"probity": 1},
        ["x"] * 17 + ["probity"],
    ):
        yield changed("aud", aud)
    for exp in (NOW - 31, 0, -1, str(NOW + 60), "never", 2**53 + 2, 2**2000, NOW - 61):
        yield changed("exp", exp)
    yield "exp not after iat", credential(good_claims(iat=NOW - 5, exp=NOW - 5))
    for time in ("1e999", "-1e999", "NaN", "Infinity", "-Infinity", "1e308"):
        for name in ("exp", "iat", "nbf"):
            yield f"{name} {time}", raw(GOOD_HEADER, claims_text(**{name: time}))
    for iat in (NOW + 31, NOW + 3600, "1", -1):
        yield changed("iat", iat)
    for nbf in (NOW + 31, None, "0", True, []):
        yield changed("nbf", nbf)
    bad_tenants = (
        "ACME",
        "acme bank",
        "acme\x00bank",
        "acme-bank\n",
        "-acme",
        "acme-",
        "a" * 64,
        "**",
        "acme/*",
        "system",
    )
    for tenant in (*bad_tenants, "äcme", "acme-bank\u0000", "../acme-bank", 7):
        yield changed("tenant", tenant)
    for roles in ("app", ["App"], ["app", ""], ["app\x00"], [1], ["a"] * 33, ["r" * 65], ["*"]):
        yield changed("roles", roles)
    for sub in ("a\x00b", "a\nb", "a\u2028b", "x" * 257, 5):
        yield changed("sub", sub)
    for name in ("client", "purpose"):
        for value in ("", "a\x00b", "a b", "x" * 200, 1, ["svc-crm"], "\n", "-x"):
            yield changed(name, value)
    yield "sub half a surrogate", raw(GOOD_HEADER, claims_text(sub='"\\ud800"'))
    yield "tenant twice", raw(GOOD_HEADER, claims_text()[:-1] + ',"tenant":"globex-health"}')
    yield "exp twice, escaped", raw(GOOD_HEADER, claims_text()[:-1] + ',"\\u0065xp":99999999999}')
    yield "claims deep", raw(GOOD_HEADER, claims_text()[:-1] + ',"x":' + "[" * 2000 + "]" * 2000 + "}")
    yield "claims one too deep", raw(GOOD_HEADER, claims_text(x="[" * 8 + "]" * 8))
    yield "claims deep objects", raw(GOOD_HEADER, claims_text()[:-1] + ',"x":' + '{"a":' * 400 + "1" + "}" * 400 + "}")
    yield "claims a list", raw(GOOD_HEADER, "[]")
    yield "claims a number", raw(GOOD_HEADER, "1")
    yield "claims empty", raw(GOOD_HEADER, "{}")
    yield "claims cut off", raw(GOOD_HEADER, claims_text()[:-1])
    yield "claims followed by more", raw(GOOD_HEADER, claims_text() + "{}")
    yield "claims with a byte order mark", raw(GOOD_HEADER, "\ufeff" + claims_text())
    yield "a number of 5,000 digits", raw(GOOD_HEADER, claims_text(x="9" * 5000))
    yield "issuer of RS256 that may only ES256", credential(good_claims(iss=OTHER_ISSUER), sign=rs256(rsa_key("other")))
    yield "another issuer's key", es_credential(good_claims(iss=OTHER_ISSUER))


def hostile_signatures() -> Iterator[tuple[str, str]]:
    good, head_and_claims = credential(), credential().rpartition(".")[0]
    yield "another RSA key", credential(sign=rs256(rsa_key("evil")))
    yield "another EC key", es_credential(sign=es256(ec_key("evil")))
    yield "PSS", credential(sign=pss)
    yield "SHA-512", credential(sign=lambda m: rsa_key().sign(m, padding.PKCS1v15(), hashes.SHA512()))
    yield "ES256 as DER", es_credential(sign=der_signature)
    for length in (0, 1, 31, 32, 63, 65, 96, 128, 256):
        yield f"ES256 of {length} bytes", es_credential(sign=lambda m, n=length: (es256(ec_key())(m) * 4)[:n])
    order = P256_ORDER.to_bytes(32, "big")
    for r, s in ((bytes(32), bytes(32)), (order, order), (b"\xff" * 32, b"\xff" * 32), (bytes(31) + b"\1", bytes(32))):
        yield f"ES256 r={r[:2].hex()} s={s[:2].hex()}", es_credential(sign=lambda _, v=r + s: v)
    for length in (0, 1, 255, 257, 512):
        yield f"RS256 of {length} bytes", credential(sign=lambda m, n=length: (rs256(rsa_key())(m) * 2)[:n])
    yield "RS256 of zeros", credential(sign=lambda _: bytes(256))
    yield "RS256 of ones", credential(sign=lambda _: b"\xff" * 256)
    head, _, tail = good.split(".")
    yield "claims swapped under the signature", f"{head}.{b64(json.dumps(good_claims(sub='eve')).encode())}.{tail}"
    yield "signature cut off", good[:-4]
    yield "signature with left-over bits", good[:-1] + chr(ord(good[-1]) + 1)
    yield "signature absent", head_and_claims
    yield "signature empty", head_and_claims + "."
    yield "signature padded", good + "=="
    yield "four segments", good + ".AAAA"
    yield "five segments, as encrypted", ".".join(["AAAA"] * 5)


def hostile_bytes() -> Iterator[tuple[str, bytes]]:
    good = credential().encode()
    yield "nothing", b""
    yield "a word", b"sk-proj-abcdef"
    yield "dots", b".."
    yield "many dots", b"." * 4000
    yield "garbage", bytes(range(256))
    yield "null bytes", good + b"\x00"
    yield "newline", good + b"\n"
    yield "tab inside", good[:10] + b"\t" + good[10:]
    yield "standard base64", good[:10] + b"+/" + good[12:]
    yield "percent", good.replace(b".", b"%2e")
    yield "latin-1", good[:-1] + b"\xe9"
    yield "not base64 of any length", b"A.A.A"
    yield "two credentials", good + b" " + good
    yield "comma", good + b"," + good
    yield "oversize", good + b"A" * MAX_CREDENTIAL_BYTES
    yield "oversize by padding claims", credential(good_claims(pad="x" * MAX_CREDENTIAL_BYTES)).encode()
    yield "a megabyte", b"A" * 1_000_000


async def test_what_the_hostile_texts_are_made_of_is_good() -> None:
    """Otherwise they would be refused for another reason than the one they are named for."""
    _, sent = await ask(bearer(raw(GOOD_HEADER, claims_text())))
    assert sent[0]["status"] == 204


HOSTILE = [*hostile_headers(), *hostile_claims(), *hostile_signatures(), *hostile_bytes()]


@pytest.mark.parametrize("token", [case[1] for case in HOSTILE], ids=[case[0] for case in HOSTILE])
async def test_every_hostile_credential_gets_the_one_constant_answer(token: str | bytes) -> None:
    assert_refused(*await ask(bearer(token)))


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"authorization", b"")],
        [(b"authorization", b"Bearer")],
        [(b"authorization", b"Bearer ")],
        [(b"authorization", b"Basic dXNlcjpwYXNz")],
        [(b"authorization", credential().encode())],
        [(b"authorization", b"Bearer\t" + credential().encode())],
        [(b"authorization", b" Bearer " + credential().encode())],
        [(b"authorization", b"BearerX " + credential().encode())],
        [*bearer(credential()), *bearer(credential())],
        [*bearer(credential()), (b"authorization", b"")],
        [(b"proxy-authorization", b"Bearer " + credential().encode())],
        [(b"x-api-key", credential().encode())],
        [(b"cookie", b"authorization=Bearer " + credential().encode())],
    ],
)
async def test_a_credential_is_taken_from_one_authorization_header_only(headers: Headers) -> None:
    assert_refused(*await ask(headers))


@given(st.binary(max_size=400))
@settings(max_examples=200)
async def test_any_header_value_is_refused_alike(value: bytes) -> None:
    assert_refused(*await ask([(b"authorization", value)]))


@given(st.data())
@settings(max_examples=300)
async def test_any_change_of_any_byte_of_a_good_credential_is_refused(data: st.DataObject) -> None:
    token = bytearray(data.draw(st.sampled_from(GOOD_ONES)))
    position = data.draw(st.integers(0, len(token) - 1))
    token[position] = data.draw(st.integers(0, 255).filter(lambda byte: byte != token[position]))
    assert_refused(*await ask(bearer(bytes(token))))


GOOD_ONES = [credential().encode(), es_credential().encode()]


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=8,
    ),
    st.sampled_from(sorted(good_claims())),
)
@settings(max_examples=200)
async def test_any_value_of_any_claim_is_read_or_refused_and_never_fails(value: object, name: str) -> None:
    inner, sent = await ask(bearer(credential(good_claims(**{name: value}))))
    assert sent[0]["status"] == (204 if inner.principals else 401)


async def test_a_public_path_is_matched_exactly() -> None:
    inner, sent = await ask([], path="/livez")
    assert (sent[0]["status"], inner.principals) == (204, [None])
    for path in ("/livez/", "//livez", "/livez/../v1/models", "/LIVEZ", "/livez%2f", "/x/livez", "/livez?x", ""):
        assert_refused(*await ask([], path=path))


async def test_a_forwarded_path_or_host_opens_nothing() -> None:
    headers = [(b"host", b"livez"), (b"x-original-url", b"/livez"), (b"x-rewrite-url", b"/livez")]
    assert_refused(*await ask(headers))


async def test_a_websocket_without_a_credential_is_closed() -> None:
    sent: list[Message] = []

    async def receive() -> Message:
        raise AssertionError("nothing is read")

    async def send(message: Message) -> None:
        sent.append(message)

    scope: Scope = {"type": "websocket", "path": "/livez", "headers": []}
    await Authentication(Inner(), verifier(), frozenset({"/livez"}))(scope, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]


# --- one reason each, for the counters ---


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        (b"x", Refusal.MALFORMED),
        (credential(header={"jku": "x"}).encode(), Refusal.HEADER),
        (credential(header={"alg": "HS256"}).encode(), Refusal.ALGORITHM),
        (credential(header={"kid": "other"}).encode(), Refusal.KEY),
        (credential(good_claims(iss="x")).encode(), Refusal.ISSUER),
        (credential(sign=rs256(rsa_key("evil"))).encode(), Refusal.SIGNATURE),
        (credential(good_claims(exp=NOW - 40)).encode(), Refusal.EXPIRED),
        (credential(good_claims(aud="x")).encode(), Refusal.CLAIMS),
    ],
)
async def test_the_reason_is_for_us_and_carries_nothing_of_the_credential(token: bytes, reason: Refusal) -> None:
    with pytest.raises(CredentialRefused) as caught:
        await verifier().verify(token)
    assert caught.value.reason is reason
    assert str(caught.value) == reason.value
    assert caught.value.__cause__ is None


async def test_an_issuer_may_speak_for_its_tenants_only() -> None:
    by = verifier(tenants=frozenset({"acme-bank"}))
    assert (await by.verify(credential().encode())).tenant == "acme-bank"
    for tenant in ("globex-health", "*"):
        with pytest.raises(CredentialRefused):
            await by.verify(credential(good_claims(tenant=tenant)).encode())


async def test_an_issuer_whose_set_holds_a_weak_key_has_no_keys() -> None:
    weak = rsa_key("weak", 1024)
    keys = fixed_keys(jwks(rsa_jwk(weak, "rsa-1")))
    by = TokenVerifier([TrustedIssuer(Expectation(ISSUER, "probity"), frozenset({"RS256"}), keys)], lambda: NOW)
    assert_refused(*await ask(bearer(credential(sign=rs256(weak))), by=by))


# --- what is remembered ---


class Moving:
    """A verifier of one issuer whose clock moves and whose key set changes."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.seconds = 0.0

        async def fetch() -> FetchedSet:
            return FetchedSet(self.data)

        keys = IssuerKeys(fetch, lambda: self.seconds)
        trusted = TrustedIssuer(Expectation(ISSUER, "probity"), frozenset({"RS256"}), keys)
        self.by = TokenVerifier([trusted], lambda: NOW + self.seconds)

    async def refused(self, token: str) -> Refusal | None:
        try:
            await self.by.verify(token.encode())
        except CredentialRefused as refused:
            return refused.reason
        return None


async def test_a_remembered_credential_expires_like_any_other() -> None:
    moving = Moving(jwks(rsa_jwk(rsa_key(), "rsa-1")))
    token = credential(good_claims(exp=int(NOW) + 100))
    assert [await moving.refused(token) for _ in range(3)] == [None] * 3
    moving.seconds = 131.0
    assert await moving.refused(token) is Refusal.EXPIRED


@pytest.mark.parametrize("other", [rsa_jwk(rsa_key("second"), "rsa-1"), rsa_jwk(rsa_key(), "rsa-2")])
async def test_a_remembered_credential_is_refused_once_its_key_was_rotated(other: dict[str, object]) -> None:
    moving = Moving(jwks(rsa_jwk(rsa_key(), "rsa-1")))
    token = credential(good_claims(exp=int(NOW) + 5000))
    assert [await moving.refused(token) for _ in range(2)] == [None] * 2
    moving.data, moving.seconds = jwks(other), 1000.0
    assert await moving.refused(token) in (Refusal.SIGNATURE, Refusal.KEY)
    moving.data, moving.seconds = jwks(rsa_jwk(rsa_key(), "rsa-1")), 2000.0
    assert await moving.refused(token) is None  # the same key in a new set


async def test_a_change_of_a_remembered_credential_is_another_credential() -> None:
    moving = Moving(jwks(rsa_jwk(rsa_key(), "rsa-1")))
    token = credential()
    assert await moving.refused(token) is None
    head, _, tail = token.split(".")
    other = b64(json.dumps(good_claims(sub="somebody else")).encode())
    assert await moving.refused(f"{head}.{other}.{tail}") is Refusal.SIGNATURE
    assert await moving.refused(token) is None


async def test_only_so_many_credentials_are_remembered_and_only_good_ones() -> None:
    moving = Moving(jwks(rsa_jwk(rsa_key(), "rsa-1")))
    signed = credential().rsplit(".", 1)
    for number in range(20):
        assert await moving.refused(f"{signed[0]}.{b64(bytes([number]) * 256)}") is Refusal.SIGNATURE
    assert len(moving.by._verified) == 0
    for number in range(MAX_REMEMBERED + 5):
        assert await moving.refused(credential(good_claims(jti=str(number)))) is None
    assert len(moving.by._verified) == MAX_REMEMBERED


def test_a_verifier_that_would_trust_too_much_is_not_made() -> None:
    keys = fixed_keys(jwks())
    expected = Expectation(ISSUER, "probity")
    with pytest.raises(ValueError, match="at least one"):
        TokenVerifier([], lambda: NOW)
    for algorithms in (frozenset[str](), frozenset({"RS256", "HS256"}), frozenset({"none"})):
        with pytest.raises(ValueError, match="algorithms"):
            TokenVerifier([TrustedIssuer(expected, algorithms, keys)], lambda: NOW)
    wide = Expectation(ISSUER, "probity", leeway_s=61)
    with pytest.raises(ValueError, match="leeway"):
        TokenVerifier([TrustedIssuer(wide, frozenset({"RS256"}), keys)], lambda: NOW)
    with pytest.raises(ValueError, match="twice"):
        TokenVerifier([TrustedIssuer(expected, frozenset({"RS256"}), keys)] * 2, lambda: NOW)


def test_the_encryption_half_of_the_library_is_never_imported() -> None:
    script = "import sys, gateway.auth.trust, gateway.auth.development; print('jose.jwe' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"
