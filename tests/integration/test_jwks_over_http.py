"""Key sets fetched from a real HTTP server on loopback: rotation, and answers that are not what they should be."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import httpx
import pytest

from gateway.auth.jwks import (
    DEFAULT_CACHE_S,
    MAX_JWKS_BYTES,
    REFETCH_INTERVAL_S,
    IssuerKeys,
    JwksUnavailable,
    from_url,
)
from gateway.auth.trust import key_client
from tests.support.credentials import ec_jwk, ec_key, jwks, rsa_jwk, rsa_key


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


Respond = Callable[[bytes], bytes]


@contextlib.asynccontextmanager
async def http_server(respond: Respond) -> AsyncIterator[str]:
    """A real server on loopback: `respond` makes the whole answer from the request's head."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            writer.write(respond(await reader.readuntil(b"\r\n\r\n")))
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/keys"


def answer(body: bytes, status: str = "200 OK", headers: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n{headers}connection: close\r\n\r\n".encode() + body


async def test_rotation_over_http() -> None:
    clock, published = Clock(), [jwks(rsa_jwk(rsa_key(), "2026-10"))]
    async with http_server(lambda _: answer(published[-1])) as url, key_client() as client:
        keys = IssuerKeys(from_url(url, client), clock)
        assert await keys.find("2026-10", "RS256")
        published.append(jwks(rsa_jwk(rsa_key(), "2026-10"), ec_jwk(ec_key(), "2026-11")))
        assert await keys.find("2026-11", "ES256") is None  # just fetched: not yet again
        clock.now += REFETCH_INTERVAL_S
        assert await keys.find("2026-11", "ES256")
        published.append(jwks(ec_jwk(ec_key(), "2026-11")))
        clock.now += DEFAULT_CACHE_S
        assert await keys.find("2026-11", "ES256")
        assert await keys.find("2026-10", "RS256") is None
    clock.now += DEFAULT_CACHE_S  # the server is gone
    assert await keys.find("2026-11", "ES256")


@pytest.mark.parametrize(
    ("header", "cache_s"),
    [("", 600), ("max-age=1", 300), ("public, Max-Age=700", 700), ("max-age=99999", 900), ("s-maxage=1", 600)],
)
async def test_the_issuers_wish_is_honoured_between_five_and_fifteen_minutes(header: str, cache_s: float) -> None:
    line = f"cache-control: {header}\r\n" if header else ""
    async with http_server(lambda _: answer(jwks(), headers=line)) as url, key_client() as client:
        assert (await from_url(url, client)()).cache_s == cache_s


GZIPPED = "content-encoding: gzip\r\n"


@pytest.mark.parametrize(
    "response",
    [
        answer(jwks(), "404 Not Found"),
        answer(b"", "302 Found", "location: http://127.0.0.1:9/keys\r\n"),
        answer(jwks(), headers=GZIPPED),
        answer(b"x" * (MAX_JWKS_BYTES + 1)),
        b"HTTP/1.1 200 OK\r\ncontent-length: 5000\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + (b"4000\r\n" + b"x" * 0x4000 + b"\r\n") * 5,
        b"garbage\r\n\r\n",
        b"",
    ],
)
async def test_an_answer_that_is_not_a_plain_small_document_is_unavailable(response: bytes) -> None:
    async with http_server(lambda _: response) as url, key_client() as client:
        with pytest.raises(JwksUnavailable):
            await from_url(url, client)()


async def test_nothing_of_ours_is_told_to_the_issuer() -> None:
    heads: list[bytes] = []

    def respond(head: bytes) -> bytes:
        heads.append(head.lower())
        return answer(jwks(), headers="set-cookie: a=b\r\n")

    async with http_server(respond) as url, key_client() as client:
        await from_url(url, client)()
    assert b"authorization" not in heads[0]
    assert b"accept-encoding: identity" in heads[0]


async def test_an_address_that_cannot_be_reached_is_unavailable() -> None:
    async with http_server(lambda _: b"") as url:
        pass
    async with key_client() as client, httpx.AsyncClient() as other:
        for chosen in (client, other):
            with pytest.raises(JwksUnavailable):
                await from_url(url, chosen)()
