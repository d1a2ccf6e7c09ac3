"""Rendering: OpenAI's shapes, chunk by chunk and whole; and a client that leaves is only ever an abandoned outbox."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest
from starlette.types import Message

from engine.request import TokenLogprob
from gateway import errors
from gateway.answer import Event, Failure, Outbox, Piece, Usage
from gateway.errors import ApiError
from gateway.rendering.chat import ChatRenderer
from gateway.rendering.completions import CompletionRenderer
from gateway.rendering.renderer import DONE, Envelope
from gateway.streaming import EventStream, chunks, collect, watch_disconnect

ENVELOPE = Envelope("0193f0c2-aaaa-7bbb-8ccc-0123456789ab", 1_763_668_980, "bank-chat", "sha256:" + "a" * 64)
USAGE = Usage(7, 4, 3, "receipt")
NASTY = 'a"b\\c\n\r\n\ndata: [DONE]\n\n\u2028é🏦\0'


def token_text(token: int) -> bytes:
    return bytes([token])


def chat(**options: bool) -> ChatRenderer:
    return ChatRenderer(ENVELOPE, token_text, **({"include_usage": False, "logprobs": False} | options))


def plain(**options: bool) -> CompletionRenderer:
    return CompletionRenderer(ENVELOPE, token_text, **({"include_usage": False, "logprobs": False} | options))


def filled(*events: Event) -> Outbox:
    outbox = Outbox(on_abandon=lambda: None)
    for event in events:
        outbox.put(event)
    return outbox


def events_of(body: bytes) -> list[Any]:
    """Read server-sent events as a client does: by blank lines."""
    parts = body.split(b"\n\n")
    assert parts.pop() == b""
    assert all(part.startswith(b"data: ") and b"\n" not in part for part in parts)
    return [part if part == b"data: [DONE]" else orjson.loads(part[6:]) for part in parts]


async def streamed(outbox: Outbox, renderer: Any, choices: int = 1) -> list[Any]:
    return events_of(b"".join([part async for part in chunks(outbox, renderer, choices)]))


# --- streamed ---


async def test_a_chat_stream_opens_each_choice_carries_text_and_ends_with_done() -> None:
    outbox = filled(Piece(0, "Hel"), Piece(1, "x"), Piece(0, "lo", (), "stop"), Piece(1, "", (), "length"), USAGE)
    *events, done = await streamed(outbox, chat(), 2)
    assert done == b"data: [DONE]"
    assert [(e["choices"][0]["index"], e["choices"][0]["delta"]) for e in events] == [
        (0, {"role": "assistant", "content": ""}),
        (1, {"role": "assistant", "content": ""}),
        (0, {"content": "Hel"}),
        (1, {"content": "x"}),
        (0, {"content": "lo"}),
        (1, {}),
    ]
    assert [e["choices"][0]["finish_reason"] for e in events] == [None, None, None, None, "stop", "length"]
    assert {(e["id"], e["object"], e["model"], e["system_fingerprint"]) for e in events} == {
        (f"chatcmpl-{ENVELOPE.request_id}", "chat.completion.chunk", "bank-chat", ENVELOPE.fingerprint)
    }
    assert all("usage" not in event for event in events)


async def test_usage_is_null_until_the_last_chunk_which_has_no_choices() -> None:
    outbox = filled(Piece(0, "a", (), "stop"), USAGE)
    *events, last, done = await streamed(outbox, chat(include_usage=True))
    assert all(event["usage"] is None for event in events)
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 3,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    assert done == b"data: [DONE]"


@pytest.mark.parametrize("renderer", [chat, plain])
async def test_no_text_can_break_out_of_its_event(renderer: Any) -> None:
    events = await streamed(filled(*(Piece(0, part) for part in NASTY), Piece(0, NASTY, (), "stop"), USAGE), renderer())
    texts = [c.get("text") or c.get("delta", {}).get("content") or "" for e in events[:-1] for c in e["choices"]]
    assert "".join(texts) == NASTY * 2
    assert events.count(b"data: [DONE]") == 1


async def test_a_failure_in_the_middle_is_an_error_event_without_done() -> None:
    events = await streamed(filled(Piece(0, "a"), Failure(errors.suspended())), chat())
    assert events[-1]["error"]["code"] == "suspended"
    assert b"data: [DONE]" not in events


async def test_a_plain_completion_streams_text_with_running_offsets() -> None:
    entries = [TokenLogprob(ord(c), -0.5, ((ord(c), -0.5), (ord("z"), -2.0))) for c in "abc"]
    outbox = filled(Piece(0, "ab", tuple(entries[:2])), Piece(0, "c", (entries[2],), "stop"), USAGE)
    first, second, _ = await streamed(outbox, plain(logprobs=True))
    assert first["object"] == "text_completion"
    assert first["choices"][0]["text"] == "ab"
    assert first["choices"][0]["logprobs"]["text_offset"] == [0, 1]
    assert second["choices"][0]["logprobs"]["text_offset"] == [2]
    assert second["choices"][0]["logprobs"]["top_logprobs"] == [{"c": -0.5, "z": -2.0}]


async def test_log_probabilities_of_half_a_character_are_given_as_bytes() -> None:
    euro = "€".encode()
    entries = tuple(TokenLogprob(byte, -1.0) for byte in euro)
    events = await streamed(filled(Piece(0, "€", entries, "stop"), USAGE), chat(logprobs=True))
    content = events[1]["choices"][0]["logprobs"]["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]) == euro
    assert [entry["top_logprobs"] for entry in content] == [[], [], []]


# --- whole ---


async def test_a_whole_answer_joins_the_pieces_of_each_choice() -> None:
    outbox = filled(Piece(1, "x"), Piece(0, "a"), Piece(0, "b", (), "stop"), Piece(1, "y", (), "content_filter"), USAGE)
    collected = await collect(outbox, 2)
    assert collected is not None
    answer = orjson.loads(chat().whole(*collected))
    assert [(c["index"], c["message"]["content"], c["finish_reason"]) for c in answer["choices"]] == [
        (0, "ab", "stop"),
        (1, "xy", "content_filter"),
    ]
    assert answer["usage"]["total_tokens"] == 10
    texts = orjson.loads(plain().whole(*collected))["choices"]
    assert [choice["text"] for choice in texts] == ["ab", "xy"]


async def test_a_whole_answer_that_failed_raises_its_error() -> None:
    with pytest.raises(ApiError) as failed:
        await collect(filled(Piece(0, "half"), Failure(errors.engine_unavailable())), 1)
    assert failed.value.code == "engine_unavailable"


async def test_a_whole_answer_that_nobody_waits_for_is_none() -> None:
    outbox = filled(Piece(0, "half"))
    outbox.abandon()
    assert await collect(outbox, 1) is None


# --- a client that leaves ---


class Client:
    """The far end of an ASGI connection."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()
        self.messages: list[Message] = []
        self.breaks_at: int | None = None  # the send with this number raises

    async def receive(self) -> Message:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if self.breaks_at is not None and len(self.messages) >= self.breaks_at:
            raise OSError("connection reset")
        self.messages.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)


def response_to(outbox: Outbox) -> EventStream:
    return EventStream(outbox, chat(), 1, {"probity-receipt": "r"})


async def test_an_event_stream_sends_its_head_its_events_and_its_end() -> None:
    client = Client()
    outbox = Outbox(on_abandon=lambda: None)
    streaming = asyncio.create_task(response_to(outbox)({"type": "http"}, client.receive, client.send))
    for event in (Piece(0, "a"), Piece(0, "b"), Piece(0, "c", (), "stop"), USAGE):
        outbox.put(event)
        await asyncio.sleep(0.01)
    await streaming
    head, *middle, end = client.messages
    headers = dict(head["headers"])
    assert headers[b"content-type"].startswith(b"text/event-stream")
    assert headers[b"cache-control"] == b"no-store"
    assert headers[b"probity-receipt"] == b"r"
    assert b"content-length" not in headers
    assert all(message["more_body"] and message["body"] for message in middle)
    assert [b'"a"' in middle[0]["body"], b'"b"' in middle[1]["body"], b'"c"' in middle[2]["body"]] == [True] * 3
    assert (end["body"], end["more_body"]) == (DONE, False)


async def test_what_waits_together_is_sent_together() -> None:
    client = Client()
    outbox = filled(Piece(0, "a"), Piece(0, "b", (), "stop"), USAGE)
    await response_to(outbox)({"type": "http"}, client.receive, client.send)
    _, only = client.messages
    assert only["body"].count(b"data: ") == 4  # the opening, two pieces, the end
    assert not only["more_body"]


async def test_a_client_that_leaves_ends_the_stream_and_abandons_the_outbox_once() -> None:
    told: list[None] = []
    outbox = Outbox(on_abandon=lambda: told.append(None))
    client = Client()
    streaming = asyncio.create_task(response_to(outbox)({"type": "http"}, client.receive, client.send))
    outbox.put(Piece(0, "seen"))
    await asyncio.sleep(0.01)
    client.gone.set()
    await asyncio.wait_for(streaming, 5)
    assert outbox.abandoned
    assert len(told) == 1
    assert b"seen" in client.body


async def test_a_send_that_fails_abandons_the_outbox() -> None:
    told: list[None] = []
    outbox = Outbox(on_abandon=lambda: told.append(None))
    outbox.put(Piece(0, "seen"))
    client = Client()
    client.breaks_at = 1
    with pytest.raises(OSError, match="reset"):
        await response_to(outbox)({"type": "http"}, client.receive, client.send)
    assert len(told) == 1


async def test_watching_ends_with_its_block_and_abandons_nothing_by_itself() -> None:
    outbox = filled()
    client = Client()
    with watch_disconnect(client.receive, outbox):
        await asyncio.sleep(0)
    client.gone.set()
    await asyncio.sleep(0.01)
    assert not outbox.abandoned
