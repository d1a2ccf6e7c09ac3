"""An engine that answers from a script: real tokens (bytes), real deltas, real aborts, no model.

It is brought in at the edge, `create_app(settings, engine=ScriptedEngine(...))`, where a test is about the gateway and
needs to say what the engine generates, when, and whether it was asked at all.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence

from engine.dialect import Dialect
from engine.request import (
    EngineDraining,
    EngineError,
    EngineHealth,
    FinishReason,
    GenerationRequest,
    GenerationStats,
    ModelVersion,
    RequestRefused,
    Rest,
    Structure,
    StructureKind,
    TokenDelta,
    TokenLogprob,
    no_rest,
)


def _digest(name: str) -> str:
    return "sha256:" + hashlib.sha256(name.encode()).hexdigest()


_MODEL = ModelVersion(
    "scripted", _digest("version"), _digest("weights"), _digest("config"), _digest("tokenizer"), _digest("t")
)
_NUMERIC_POLICY = _digest("numeric policy")


async def _at_once(position: int) -> None:
    return None


class ScriptedEngine:
    """One token is one byte. `reply` says what to generate; `step` is awaited before each token."""

    def __init__(
        self,
        reply: Callable[[str], str] = lambda prompt: "scripted answer",
        *,
        step: Callable[[int], Awaitable[None]] = _at_once,
        fail_with: EngineError | None = None,
        context_length: int = 4096,
        chunk: int = 1,  # tokens per delta
        dialect: Dialect | None = None,
    ) -> None:
        self.dialect = dialect or Dialect()
        self._reply = reply
        self._step = step
        self._fail_with = fail_with
        self._context_length = context_length
        self._chunk = chunk
        self._aborted: set[str] = set()
        self._running: set[str] = set()
        self._draining = False
        self.forgotten: list[bytes] = []  # salts
        self.prompts: list[str] = []  # every prompt that reached the "model"

    @property
    def model(self) -> ModelVersion:
        return _MODEL

    @property
    def versions(self) -> Mapping[str, ModelVersion]:
        return {_MODEL.digest: _MODEL}

    @property
    def numeric_policy(self) -> str:
        return _NUMERIC_POLICY

    @property
    def context_length(self) -> int:
        return self._context_length

    def render_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] = (),
        options: Mapping[str, object] | None = None,
    ) -> str:
        shown = f"<tools>{json.dumps(list(tools))}\n" if tools else ""
        return shown + "".join(f"<{m['role']}>{m['content']}\n" for m in messages) + "<assistant>"

    def encode(self, text: str, *, chat: bool) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    def token_text(self, token: int) -> bytes:
        return bytes([token])

    async def prepare(self, structure: Structure) -> None:
        if structure.kind is not StructureKind.MESSAGE:  # who wrote the script kept to a message
            raise RequestRefused("a script has no structure", "response_format")

    async def generate(self, request: GenerationRequest, rest_s: Rest = no_rest) -> AsyncGenerator[TokenDelta, None]:
        if self._draining:
            raise EngineDraining("draining")
        if self._fail_with is not None:
            raise self._fail_with
        if request.pooling is not None:
            vector = struct.pack("<8f", *(byte / 255 for byte in hashlib.sha256(bytes(request.prompt)).digest()[:8]))
            yield TokenDelta("", (), (), FinishReason.STOP, self._stats(request, vector), embedding=vector)
            return
        self._running.add(request.request_id)
        self.prompts.append(self.decode(request.prompt))
        try:
            reply = self._reply(self.decode(request.prompt)).encode()
            kept = reply[: request.sampling.max_tokens]
            reason = FinishReason.STOP if len(reply) <= request.sampling.max_tokens else FinishReason.LENGTH
            sent = 0
            while sent < len(kept):
                await self._step(sent)
                if request.request_id in self._aborted:
                    reason = FinishReason.ABORT
                    break
                piece = kept[sent : sent + self._chunk]
                sent += len(piece)
                yield self._delta(request, piece)
            yield TokenDelta("", (), finish_reason=reason, stats=self._stats(request, kept[:sent]))
        finally:
            self._running.discard(request.request_id)
            self._aborted.discard(request.request_id)

    def _delta(self, request: GenerationRequest, piece: bytes) -> TokenDelta:
        wanted = request.sampling.logprobs
        logprobs = tuple(TokenLogprob(token, -0.5, ((token, -0.5),)) for token in piece) if wanted else ()
        return TokenDelta(piece.decode("latin-1"), tuple(piece), logprobs)

    def _stats(self, request: GenerationRequest, output: bytes) -> GenerationStats:
        return GenerationStats(
            prompt_tokens=len(request.prompt),
            cached_tokens=0,
            output_tokens=len(output),
            preemptions=0,
            queued_s=0.0,
            first_token_s=0.0,
            total_s=0.0,
            replay_digest=hashlib.sha256(output).hexdigest(),
        )

    def reset_cache(self, cache_salt: bytes) -> None:
        self.forgotten.append(cache_salt)

    def abort(self, request_id: str) -> None:
        if request_id in self._running:
            self._aborted.add(request_id)

    def health(self) -> EngineHealth:
        return EngineHealth(True, None, len(self._running), 0, 100, 0, 0)

    async def drain(self, timeout_s: float) -> bool:
        self._draining = True
        return not self._running

    def close(self) -> None:
        self._draining = True
