"""ByteTokenizer: a small real tokenizer. Token ids 0 … 255 are bytes, 256 ends the sequence, 257 begins it.

Ids above 257 stand for no bytes at all, so that a runner with a larger vocabulary can be read as well.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping, Sequence
from functools import cache

from engine.dialect import Dialect, ToolFormat
from engine.grammar import Grammars
from engine.request import RequestRefused, SamplingParams

EOS = 256
BOS = 257


class ByteTokenizer:
    eos_ids = frozenset({EOS})

    def __init__(self, dialect: Dialect | None = None) -> None:
        self.dialect = dialect or Dialect()

    def render_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] = (),
        options: Mapping[str, object] | None = None,
    ) -> str:
        if not messages:
            raise RequestRefused("`messages` must not be empty", "messages")
        if tools and self.dialect.tools is ToolFormat.NONE:
            raise RequestRefused("this model knows no tools; leave `tools` out", "tools")
        shown = f"<tools>{json.dumps(list(tools))}" if tools else ""
        return shown + "".join(map(_turn, messages)) + "<assistant>"

    def encode(self, text: str, *, chat: bool) -> list[int]:
        return ([] if chat else [BOS]) + list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return b"".join(self.token_text(token) for token in tokens).decode(errors="replace")

    def token_text(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""


def _turn(message: Mapping[str, object]) -> str:
    calls = f"<calls>{json.dumps(message['tool_calls'])}" if message.get("tool_calls") else ""
    return f"<{message['role']}>{message['content']}{calls}"


class ByteDetokenizer:
    def __init__(self, stop: tuple[str, ...] = ()) -> None:
        self._stop = stop
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, token_ids: Sequence[int]) -> tuple[str, bool]:
        self._held += self._decoder.decode(bytes(token for token in token_ids if token < 256))
        ends = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if ends:
            return self._held[: min(ends)], True
        return self._let_go(), False

    def finish(self) -> str:
        held, self._held = self._held + self._decoder.decode(b"", final=True), ""
        return held

    def _let_go(self) -> str:
        keep = 0
        for stop in self._stop:
            for length in range(1, len(stop)):
                if self._held.endswith(stop[:length]):
                    keep = max(keep, length)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text


class _Bytes:
    """What llguidance asks of a tokenizer."""

    eos_token_id = EOS
    bos_token_id = BOS
    special_token_ids = (EOS, BOS)
    tokens = (*(bytes([byte]) for byte in range(256)), b"<eos>", b"<bos>")

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


@cache
def byte_grammars() -> Grammars:
    from llguidance import LLTokenizer, TokenizerWrapper  # not on every machine that runs the engine

    return Grammars(LLTokenizer(TokenizerWrapper(_Bytes()), eos_token=[EOS]))


def detokenizer_for(sampling: SamplingParams) -> ByteDetokenizer:
    return ByteDetokenizer(sampling.stop)
