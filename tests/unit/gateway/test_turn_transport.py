"""What one turn of the event loop writes leaves together, in order, and nothing is lost at the end."""

from __future__ import annotations

import asyncio

import pytest

from gateway.turn_transport import TurnTransport


class Wire(asyncio.Transport):
    """Keeps what was sent, a list a call."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[list[bytes]] = []
        self.ended: str | None = None

    def writelines(self, list_of_data: object) -> None:
        assert isinstance(list_of_data, list)
        assert self.ended is None
        self.sent.append(list_of_data)

    def close(self) -> None:
        self.ended = "closed"

    def abort(self) -> None:
        self.ended = "aborted"

    def is_closing(self) -> bool:
        return self.ended is not None


@pytest.fixture
async def wire() -> Wire:
    return Wire()


@pytest.fixture
async def transport(wire: Wire) -> TurnTransport:
    return TurnTransport(wire, asyncio.get_running_loop())


async def test_what_a_turn_writes_is_sent_at_its_end_in_one_call(wire: Wire, transport: TurnTransport) -> None:
    transport.write(b"head")
    transport.writelines([b"first", b"second"])
    assert wire.sent == []
    await asyncio.sleep(0)
    assert wire.sent == [[b"head", b"first", b"second"]]


async def test_the_next_turn_has_a_call_of_its_own(wire: Wire, transport: TurnTransport) -> None:
    for piece in (b"one", b"two"):
        transport.write(piece)
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert wire.sent == [[b"one"], [b"two"]]


async def test_who_closes_sends_first(wire: Wire, transport: TurnTransport) -> None:
    transport.write(b"the end")
    transport.close()
    assert (wire.sent, wire.ended, transport.is_closing()) == ([[b"the end"]], "closed", True)
    await asyncio.sleep(0)
    assert wire.sent == [[b"the end"]]


async def test_who_aborts_sends_nothing_more(wire: Wire, transport: TurnTransport) -> None:
    transport.write(b"never")
    transport.abort()
    await asyncio.sleep(0)
    assert (wire.sent, wire.ended) == ([], "aborted")
