"""Key sets: read strictly, cached, rotated, and stale for a bounded time only."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from gateway.auth.jwks import (
    DEFAULT_CACHE_S,
    MAX_JWKS_BYTES,
    REFETCH_INTERVAL_S,
    STALE_LIMIT_S,
    FetchedSet,
    IssuerKeys,
    JwksRefused,
    JwksUnavailable,
    from_file,
    parse_jwks,
)
from tests.support.credentials import b64, ec_jwk, ec_key, jwks, rsa_jwk, rsa_key


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Source:
    """An issuer's key set that a test can change, break and count."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.broken: Exception | None = None
        self.fetches = 0

    async def __call__(self) -> FetchedSet:
        self.fetches += 1
        await asyncio.sleep(0)
        if self.broken is not None:
            raise self.broken
        return FetchedSet(self.data)


# --- reading ---


def test_keys_are_found_by_kid_and_algorithm() -> None:
    keys = parse_jwks(jwks(rsa_jwk(rsa_key(), "a"), ec_jwk(ec_key(), "a")))
    assert set(keys) == {("a", "RS256"), ("a", "ES256")}
    assert (keys["a", "RS256"].signature_bytes, keys["a", "ES256"].signature_bytes) == (256, 64)


def other_curve() -> dict[str, object]:
    numbers = ec.generate_private_key(ec.SECP384R1()).public_key().public_numbers()
    x, y = b64(numbers.x.to_bytes(48, "big")), b64(numbers.y.to_bytes(48, "big"))
    return {"kty": "EC", "crv": "P-384", "kid": "x", "x": x, "y": y}


@pytest.mark.parametrize(
    "entry",
    [
        rsa_jwk(rsa_key(), "x", use="enc"),
        rsa_jwk(rsa_key(), "x", alg="PS256"),
        rsa_jwk(rsa_key(), "x", alg="RSA-OAEP"),
        rsa_jwk(rsa_key(), "x", key_ops=["encrypt"]),
        ec_jwk(ec_key(), "x", alg="ECDH-ES"),
        {"kty": "OKP", "crv": "Ed25519", "kid": "x", "x": "AAAA"},
        {key: value for key, value in rsa_jwk(rsa_key(), "x").items() if key != "kid"},
        rsa_jwk(rsa_key(), ""),
        rsa_jwk(rsa_key(), "k" * 257),
        other_curve(),
        {"kty": "new"},
        {},
    ],
)
def test_public_keys_for_other_uses_are_passed_over(entry: dict[str, object]) -> None:
    assert set(parse_jwks(jwks(entry, ec_jwk(ec_key(), "mine")))) == {("mine", "ES256")}


def test_a_key_without_declared_use_or_algorithm_is_taken_for_the_one_it_can_do() -> None:
    bare = {key: value for key, value in rsa_jwk(rsa_key(), "x").items() if key not in {"use", "alg"}}
    assert set(parse_jwks(jwks(bare))) == {("x", "RS256")}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"kty": "oct", "kid": "x", "k": "AAAA"}, "private or a symmetric"),
        ({"kty": "oct", "kid": "x"}, "private or a symmetric"),
        (rsa_jwk(rsa_key(), "x", d="AAAA"), "private or a symmetric"),
        (rsa_jwk(rsa_key(), "x", p="AAAA", use="enc"), "private or a symmetric"),
        (ec_jwk(ec_key(), "x", d="AAAA"), "private or a symmetric"),
        (rsa_jwk(rsa_key("weak", 1024), "x"), "1024 bits"),
        (rsa_jwk(rsa.generate_private_key(65_537, 2040), "x"), "2040 bits"),
        (rsa_jwk(rsa_key(), "x", n=b64(b"\xff" * 1025)), "8200 bits"),
        (rsa_jwk(rsa_key(), "x", e="Aw"), "exponent"),
        (rsa_jwk(rsa_key(), "x", e="AQAA"), "exponent"),
        (rsa_jwk(rsa_key(), "x", n=5), "`n`"),
        (rsa_jwk(rsa_key(), "x", n="not base64!"), "`n`"),
        (rsa_jwk(rsa_key(), "x", n=str(rsa_jwk(rsa_key(), "x")["n"]) + "=="), "`n`"),
        (ec_jwk(ec_key(), "x", y=b64(b"\1" * 32)), "not a valid public key"),
        (ec_jwk(ec_key(), "x", x=b64(bytes(32)), y=b64(bytes(32))), "not a valid public key"),
        (ec_jwk(ec_key(), "x", x=b64(b"\1" * 33)), "32 bytes"),
        ([], "not an object"),
        ("key", "not an object"),
    ],
)
def test_a_set_with_a_key_nobody_should_publish_is_refused_whole(entry: dict[str, object], message: str) -> None:
    with pytest.raises(JwksRefused, match=message):
        parse_jwks(jwks(ec_jwk(ec_key(), "mine"), entry))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b'{"keys":{}}',
        b'{"keys":[],"keys":[]}',
        b'{"keys":' + b"[" * 100,
        b"\xff",
        json.dumps({"keys": [{"kty": "x"}] * 33}).encode(),
        jwks() + b" " * MAX_JWKS_BYTES,
        jwks(ec_jwk(ec_key(), "a"), ec_jwk(ec_key("other"), "a")),
    ],
)
def test_a_malformed_or_ambiguous_set_is_refused(data: bytes) -> None:
    with pytest.raises(JwksRefused):
        parse_jwks(data)


# --- the cache ---


async def test_keys_are_fetched_once_while_fresh() -> None:
    clock, source = Clock(), Source(jwks(ec_jwk(ec_key(), "a")))
    keys = IssuerKeys(source, clock)
    for _ in range(5):
        assert await keys.find("a", "ES256")
    clock.now += DEFAULT_CACHE_S - 1
    assert await keys.find("a", "ES256")
    assert source.fetches == 1
    clock.now += 2
    assert await keys.find("a", "ES256")
    assert source.fetches == 2


async def test_a_rotated_key_is_found_at_once_and_the_old_one_is_gone() -> None:
    clock, source = Clock(), Source(jwks(ec_jwk(ec_key(), "old")))
    keys = IssuerKeys(source, clock)
    assert await keys.find("old", "ES256")
    source.data = jwks(ec_jwk(ec_key("new"), "new"))
    clock.now += REFETCH_INTERVAL_S
    assert await keys.find("new", "ES256")
    assert await keys.find("old", "ES256") is None


async def test_unknown_names_ask_the_issuer_at_most_once_an_interval() -> None:
    clock, source = Clock(), Source(jwks(ec_jwk(ec_key(), "a")))
    keys = IssuerKeys(source, clock)
    for number in range(1000):
        assert await keys.find(f"unknown-{number}", "ES256") is None
    assert source.fetches == 1
    clock.now += REFETCH_INTERVAL_S
    for number in range(1000):
        assert await keys.find(f"unknown-{number}", "ES256") is None
    assert source.fetches == 2


async def test_callers_who_come_together_share_one_fetch_even_if_one_leaves() -> None:
    source = Source(jwks(ec_jwk(ec_key(), "a")))
    keys = IssuerKeys(source, Clock())
    tasks = [asyncio.ensure_future(keys.find("a", "ES256")) for _ in range(20)]
    await asyncio.sleep(0)
    tasks[0].cancel()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(found[0], asyncio.CancelledError)
    assert all(key is not None and not isinstance(key, BaseException) for key in found[1:])
    assert source.fetches == 1


@pytest.mark.parametrize("failure", [JwksUnavailable("away"), OSError("no route"), RuntimeError("surprise")])
async def test_stale_keys_serve_while_the_issuer_is_away_and_no_longer_than_the_bound(failure: Exception) -> None:
    clock, source = Clock(), Source(jwks(ec_jwk(ec_key(), "a")))
    keys = IssuerKeys(source, clock)
    assert await keys.find("a", "ES256")
    source.broken = failure
    clock.now += DEFAULT_CACHE_S + 1
    assert await keys.find("a", "ES256")
    assert keys.last_error is not None
    fetches = source.fetches
    assert await keys.find("a", "ES256")  # no new attempt for every request
    assert source.fetches == fetches
    clock.now = 1000.0 + STALE_LIMIT_S + 1
    assert await keys.find("a", "ES256") is None
    assert not await keys.ready()
    source.broken = None
    clock.now += REFETCH_INTERVAL_S
    assert await keys.find("a", "ES256")
    assert keys.last_error is None


async def test_a_set_that_turns_bad_does_not_replace_the_good_one() -> None:
    clock, source = Clock(), Source(jwks(ec_jwk(ec_key(), "a")))
    keys = IssuerKeys(source, clock)
    assert await keys.ready()
    source.data = jwks({"kty": "oct", "kid": "a", "k": "AAAA"})
    clock.now += DEFAULT_CACHE_S + 1
    assert await keys.find("a", "ES256")
    assert isinstance(keys.last_error, JwksRefused)


async def test_an_issuer_that_never_answered_is_not_asked_for_every_request() -> None:
    source = Source(b"")
    keys = IssuerKeys(source, Clock())
    for _ in range(100):
        assert await keys.find("a", "ES256") is None
    assert source.fetches == 1


# --- where sets come from ---


async def test_a_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    path, clock = tmp_path / "jwks.json", Clock()
    keys = IssuerKeys(from_file(path), clock)
    assert await keys.find("a", "ES256") is None
    path.write_bytes(jwks(ec_jwk(ec_key(), "a")))
    clock.now += REFETCH_INTERVAL_S
    assert await keys.find("a", "ES256")


async def test_a_file_without_end_is_refused() -> None:
    keys = IssuerKeys(from_file(Path("/dev/zero")), Clock())
    assert await keys.find("a", "ES256") is None
    assert isinstance(keys.last_error, JwksRefused)
