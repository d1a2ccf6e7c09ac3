"""What is asked of the engine and what it answers: values only.

A request is token ids and numbers. The engine never sees a person, a tenant's name or a policy: a tenant reaches it
as an opaque `cache_salt` (which cached blocks may be shared) and a `fairness_key` (whose turn it is).
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from engine.dialect import Dialect

MAX_SEED = 2**63 - 1


class EngineError(Exception):
    """Base of what the engine raises to its caller.

    EngineError
    ├── GenerationFailed    this request cannot go on; the others do
    ├── RequestRefused      the caller is wrong; that request alone fails, `param` names the field
    │   └── ContextTooLong  prompt + max_tokens do not fit the context
    ├── EngineOverloaded    the waiting queue is full; try again later
    ├── EngineDraining      no new requests are taken
    └── EngineDead          the step thread died or is stuck; in-flight requests fail with this
    """


class RequestRefused(EngineError):
    """The request can never be served as written. `param` is the offending field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextTooLong(RequestRefused):
    """The prompt (and the tokens asked for) exceed the context length."""


class GenerationFailed(EngineError):
    """The request cannot go on as it was asked for. Nothing is wrong with the engine."""


class EngineOverloaded(EngineError):
    """The bounded waiting queue is full."""


class EngineDraining(EngineError):
    """The engine finishes what it has and takes nothing new."""


class EngineDead(EngineError):
    """The engine thread failed or stopped making progress."""


class FinishReason(StrEnum):
    STOP = "stop"  # end-of-sequence token, stop string or stop token
    LENGTH = "length"  # max_tokens or the context length
    ABORT = "abort"  # the caller aborted


class Pooling(StrEnum):
    """How the hidden states of a text become one vector, of length 1."""

    MEAN = "mean"  # of all tokens
    LAST = "last"  # of the last token


class StructureKind(StrEnum):
    JSON_SCHEMA = "json_schema"  # `source` is the schema, JSON text
    REGEX = "regex"
    CHOICE = "choice"  # `source` is a JSON list of texts
    LARK = "lark"
    MESSAGE = "message"  # thoughts, words and calls; made by dialect.py


@dataclass(frozen=True, slots=True)
class Structure:
    """What the whole output must look like."""

    kind: StructureKind
    source: str = field(repr=False)  # the caller's own words


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen, in the order of sampler.py: bias → penalties → grammar, allowed and banned tokens →
    temperature → top-k → top-p → min-p → Gumbel argmax."""

    max_tokens: int  # ≥ 1
    seed: int  # 0 … 2**63 − 1; always present, drawn by the gateway when the client gives none
    temperature: float = 1.0  # 0 … 2; 0 is greedy
    top_p: float = 1.0  # (0, 1]
    top_k: int = 0  # 0 keeps the whole vocabulary
    min_p: float = 0.0  # [0, 1]
    stop: tuple[str, ...] = ()  # at most 16 strings, each 1 … 256 characters; not part of the output
    ignore_eos: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()  # at most 1024 (token id, −100 … 100), ascending ids
    repetition_penalty: float = 1.0  # (0, 2]; of tokens in prompt or output: logits above 0 divided, others multiplied
    frequency_penalty: float = 0.0  # −2 … 2; taken off for every time a token is in the output
    presence_penalty: float = 0.0  # −2 … 2; taken off once for a token that is in the output
    allowed_tokens: tuple[int, ...] = ()  # at most 1024 ids, ascending; empty: all
    stop_tokens: tuple[int, ...] = ()  # at most 16 ids, ascending; each ends the output as the end-of-sequence does
    min_tokens: int = 0  # before so many, no end-of-sequence and no stop token is chosen; a stop string ends it still
    structure: Structure | None = None  # not with ignore_eos, min_tokens or allowed_tokens, which contradict it
    logprobs: bool = False
    top_logprobs: int = 0  # 0 … 20, only with logprobs
    prompt_logprobs: int | None = None  # 0 … 20 alternatives beside each token of the prompt but the first; None: none

    @property
    def looks_back(self) -> bool:
        """Whether what is chosen depends on which tokens stand before, beside the model's own view of them."""
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    request_id: str  # unique among requests in flight
    prompt: tuple[int, ...]  # token ids, at least one
    sampling: SamplingParams
    cache_salt: bytes  # server-derived; blocks of one salt are never visible to another
    fairness_key: str
    weight: int = 1  # of the key among others, 1 … 1000; the latest request's counts
    priority: int = 0  # within the key, −1000 … 1000: the lower goes first
    # An output to go through instead of generating one, at most `max_tokens` long. For every position the deltas tell
    # which token would have been sampled after the ones before it, and its logprob; they bring no text. See replay.py.
    forced: tuple[int, ...] = ()
    # Instead of generating: the vector of the prompt. `sampling` is looked at no further; the one delta brings no text.
    pooling: Pooling | None = None
    adapter: str | None = None  # what is loaded beside the model, by name; None: the model alone


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token: int
    logprob: float  # float32 value, natural logarithm, of the untempered distribution
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), best first, ties by lowest id


@dataclass(frozen=True, slots=True)
class GenerationStats:
    """Known when a request has finished."""

    prompt_tokens: int
    cached_tokens: int  # prompt tokens found in the prefix cache
    output_tokens: int
    preemptions: int
    queued_s: float
    first_token_s: float  # seconds from arrival to the first token
    total_s: float
    replay_digest: str  # hex SHA-256, rolling over (token id ‖ logprob float32 bits) per output position; of a vector


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """What one step, or several, added to one request.

    `text` trails the tokens: a partial UTF-8 sequence or a possible stop string is held back until it is decided. The
    concatenation of all texts is the output; the last delta carries `finish_reason` and `stats`.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stats: GenerationStats | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()  # with the first token: of every token of the prompt but the first
    embedding: bytes | None = None  # [hidden size] float32, little-endian

    def __reduce__(self) -> tuple[type[TokenDelta], tuple[object, ...]]:
        """As `core.Emission`'s."""
        others = (self.logprobs, self.finish_reason, self.stats, self.prompt_logprobs, self.embedding)
        return TokenDelta, (self.text, self.tokens, *others)


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    name: str  # as requests name it; the digest does not depend on it
    digest: str  # of its files


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """What answered. Every digest is `sha256:<64 hex>`."""

    name: str
    digest: str  # over the digests below
    weights: str
    config: str
    tokenizer: str
    template: str  # the chat template
    adapter: AdapterVersion | None = None  # None: the model alone
    cast: tuple[str, ...] = ()  # types that weights are stored in and were cast from, to bfloat16: `float16`, …


@dataclass(frozen=True, slots=True)
class EngineHealth:
    alive: bool
    last_step_age_s: float | None  # seconds since the last completed step, while work is pending; else None
    running: int
    waiting: int
    free_blocks: int
    cached_blocks: int
    used_blocks: int
    interrupted_steps: int = 0  # since the start: steps given up for who came meanwhile


def choice_seed(seed: int, index: int) -> int:
    """Return the seed of choice `index` of a request with `n` choices. Choice 0 keeps the request's own seed."""
    if index == 0:
        return seed
    mixed = hashlib.sha256(f"probity/choice/{seed}/{index}".encode()).digest()
    return int.from_bytes(mixed[:8], "big") & MAX_SEED


Rest = Callable[[], float]  # asked for seconds


def no_rest() -> float:
    return 0.0


class Engine(Protocol):
    """What the gateway needs of an engine. Ours is `EngineRuntime`; tests bring a scripted one."""

    @property
    def model(self) -> ModelVersion:
        """The model without any adapter."""
        ...

    @property
    def versions(self) -> Mapping[str, ModelVersion]:
        """Everything that can answer, by digest: the model alone, and with each adapter."""
        ...

    @property
    def numeric_policy(self) -> str:
        """The digest (`sha256:…`) under which bits repeat: machine, libraries, kernels, constants."""
        ...

    @property
    def context_length(self) -> int: ...

    @property
    def dialect(self) -> Dialect: ...

    def render_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] = (),
        options: Mapping[str, object] | None = None,
    ) -> str:
        """Return the prompt text the chat template makes of `messages`, generation prompt included.

        `tools` are what the template shows the model as such, `options` further variables of the template.

        Raises: RequestRefused.
        """
        ...

    def encode(self, text: str, *, chat: bool) -> list[int]:
        """Return token ids. With `chat`, `text` is a rendered template: its special tokens are meant as such and none
        are added. Without, special tokens written in `text` stay plain text and the model's BOS is added."""
        ...

    def decode(self, tokens: Sequence[int]) -> str: ...

    def token_text(self, token: int) -> bytes:
        """Return the bytes of one token, for logprobs."""
        ...

    async def prepare(self, structure: Structure) -> None:
        """Make sure that outputs of this structure can be generated.

        Raises: RequestRefused: it cannot be enforced. EngineDead.
        """
        ...

    def generate(self, request: GenerationRequest, rest_s: Rest = no_rest) -> AsyncIterator[TokenDelta]:
        """Yield deltas until one carries a finish reason. Closing the iterator aborts the request.

        `rest_s` is asked after each delta for how many seconds none is wanted but the last; what comes meanwhile, or
        while the consumer is busy, may be given as one.

        Raises: RequestRefused, EngineOverloaded, EngineDraining on the first step; EngineDead at any.
        """
        ...

    def abort(self, request_id: str) -> None: ...

    def reset_cache(self, cache_salt: bytes) -> None:
        """Let nothing be found again that was cached under a salt. Returns at once; the next step knows."""
        ...

    def health(self) -> EngineHealth: ...

    async def drain(self, timeout_s: float) -> bool:
        """Take nothing new; return whether all in flight ended within `timeout_s`."""
        ...

    def close(self) -> None: ...
