"""What is put on record: the closed list of record types, and a record before it is a leaf.

A record becomes a leaf (canonical.py, writer.py) when the writer numbers it. The leaf is RFC 8785 canonical JSON,
at most 65,535 bytes, keys `[a-z0-9_]`, no floats, integers below 2**53. One complete example, wrapped for reading:

    {"body":{"action":"chat.completions","decision":{"effect":"allow","policy":"sha256:9f…","reasons":[{"code":
     "rule","rule":"contact-centre-summaries"}]},"guardrails":[],"limits":[],"model":{"alias":"bank-chat","engine":
     "sha256:0c…","tokenizer":"sha256:51…","version":"sha256:7a…","weights":"sha256:e3…"},"principal":{"client":
     "svc-crm","issuer":"https://id.acme.example","purpose":"complaint-summary","roles":["app"]},"sampling":
     {"max_tokens":512,"seed":"8817263554","temperature":"0.7"}},
     "identities":{"subject":"b64f…"},"log":"probity.local/acme-bank","nonce":"5e0c…32 hex…","parts":[{"com":"…64
     hex…","ct":"…64 hex…","name":"prompt"},{"com":"…","ct":"…","name":"prompt_to_model"}],"prev":"…64 hex…",
     "record":"0193f0c2-…","request":"0193f0c2-…","time":"2026-11-20T19:43:00.123456Z","type":"request.received",
     "v":1,"writer":"6f1d2a…16 hex…","writer_seq":41}

`request` is absent where a record belongs to no request. `prev` is the leaf hash of this writer's previous leaf in this
log, 64 zeros for its first; `writer_seq` counts from 0 per writer and log: a tenant sees its own gaps.

No direct identifier of a person stands in a leaf, because leaves cannot be erased. `Record.identities` holds the
identifying values; the leaf gets a keyed pseudonym of each, and the values themselves become the encrypted content
part `identities`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

LEAF_VERSION = 1
MAX_LEAF_BYTES = 65_535
SYSTEM = "system"  # the log of platform events

# What a leaf's body may hold. No floats: their text is not canonical across languages.
Json = None | bool | int | str | Sequence["Json"] | Mapping[str, "Json"]


class RecordType(StrEnum):
    """Closed and versioned: a kind is never reused with another meaning."""

    LOG_OPENED = "log.opened"
    WRITER_STARTED = "writer.started"
    WRITER_STOPPED = "writer.stopped"
    MODEL_LOADED = "model.loaded"
    POLICY_DRAFTED = "policy.drafted"
    POLICY_APPROVED = "policy.approved"
    POLICY_ACTIVATED = "policy.activated"
    POLICY_ROLLED_BACK = "policy.rolled_back"
    ACCESS_CHANGED = "access.changed"
    KILL_SWITCH_ENGAGED = "kill_switch.engaged"
    KILL_SWITCH_RELEASED = "kill_switch.released"
    REQUEST_RECEIVED = "request.received"
    REQUEST_COMPLETED = "request.completed"
    REQUEST_DENIED = "request.denied"
    REQUEST_FAILED = "request.failed"
    REQUEST_INTERRUPTED = "request.interrupted"
    AUDIT_READ = "audit.read"
    AUDIT_REVEALED = "audit.revealed"
    AUDIT_EXPORTED = "audit.exported"
    HOLD_PLACED = "hold.placed"
    HOLD_RELEASED = "hold.released"
    RETENTION_CHANGED = "retention.changed"
    RETENTION_PRUNED = "retention.pruned"
    KEY_ROTATED = "key.rotated"
    KEY_SHREDDED = "key.shredded"
    ERASURE_REQUESTED = "erasure.requested"
    ERASURE_APPROVED = "erasure.approved"
    ERASURE_EXECUTED = "erasure.executed"
    REPLAY_PERFORMED = "replay.performed"


# Exactly one of these follows every request.received; request.denied stands alone.
CLOSING = frozenset(
    {
        RecordType.REQUEST_COMPLETED,
        RecordType.REQUEST_FAILED,
        RecordType.REQUEST_INTERRUPTED,
    }
)


@dataclass(frozen=True, slots=True)
class Record:
    """Something to put on record. The writer adds id, time, nonce, number, chain and commitments."""

    type: RecordType
    tenant: str  # whose log; SYSTEM for the platform's own
    body: Mapping[str, Json]
    request_id: str | None = None  # UUIDv7 of the request it belongs to
    parts: Mapping[str, bytes] = field(default_factory=dict)  # content, encrypted beside the leaf
    identities: Mapping[str, str] = field(default_factory=dict)  # {"subject": "mia@acme.example", "source": "10.2.3.4"}


@dataclass(frozen=True, slots=True)
class Receipt:
    """Proof of the promise: whoever holds it can later demand the inclusion proof of this very leaf."""

    origin: str  # the log's name, e.g. `probity.local/acme-bank`
    writer: str
    writer_seq: int
    leaf_hash: str  # 64 hex digits

    def __str__(self) -> str:
        """The value of the `probity-receipt` header."""
        return f"{self.origin};{self.writer};{self.writer_seq};{self.leaf_hash}"


@dataclass(frozen=True, slots=True)
class Segment:
    """A released-to-be piece of an answer that is still being generated; journaled before it leaves."""

    tenant: str
    request_id: str
    choice: int  # 0 … n − 1
    sequence: int  # 0, 1, 2, … per request, over all choices
    data: bytes  # UTF-8 text exactly as it will be sent; then 0xFF and JSON, if tokens are told of


# --- the bodies of a request's records: what the officers' index and the story are built from ---


@dataclass(frozen=True, slots=True)
class ModelEntry:
    alias: str
    version: str  # digests, `sha256:<64 hex>`
    weights: str
    tokenizer: str
    template: str
    engine: str  # digest of the numeric policy
    adapter: str | None = None  # digest of what was loaded beside the weights


@dataclass(frozen=True, slots=True)
class GuardrailEntry:
    """A guardrail's verdict. `not_run` is never `passed`."""

    id: str
    detector: str
    stage: str  # input | output
    action: str  # block | redact | flag | pseudonymise
    verdict: str  # passed | flagged | redacted | blocked | error | not_run
    counts: Mapping[str, int]  # entity → matches; entity names are `[a-z0-9_]`


@dataclass(frozen=True, slots=True)
class LimitEntry:
    id: str  # the limit's name in the policy
    scope: str  # tenant | subject | client
    kind: str  # requests_per_minute | tokens_per_minute | tokens_per_day | concurrency
    reserved: int
    used: int | None = None  # known once settled


@dataclass(frozen=True, slots=True)
class DecisionEntry:
    effect: str  # allow | deny
    reasons: Sequence[Mapping[str, str]]  # each {"code": …, optional "rule": …, "detail": …}
    policy: str  # digest of the effective policy document


@dataclass(frozen=True, slots=True)
class PrincipalEntry:
    issuer: str
    roles: Sequence[str]
    client: str | None
    purpose: str | None


@dataclass(frozen=True, slots=True)
class ChoiceEntry:
    index: int
    finish_reason: str  # stop | length | content_filter | cancelled
    tokens: int
    seed: str
    replay: str  # hex digest, rolling over (token id ‖ logprob bits); of the tokens that were generated


@dataclass(frozen=True, slots=True)
class TimingEntry:
    """Microseconds since the request was received."""

    decided_us: int
    recorded_us: int
    first_token_us: int | None
    first_release_us: int | None
    total_us: int


Entry = ModelEntry | GuardrailEntry | LimitEntry | DecisionEntry | PrincipalEntry | ChoiceEntry | TimingEntry


def _said(entry: Entry) -> dict[str, Json]:
    """Return the members of an entry, absent (None) ones left out."""
    return {name: value for name in entry.__slots__ if (value := getattr(entry, name)) is not None}


def request_received(
    *,
    tenant: str,
    request_id: str,
    action: str,  # chat.completions | completions | embeddings | …
    stream: bool,
    principal: PrincipalEntry,
    decision: DecisionEntry,
    model: ModelEntry,
    sampling: Mapping[str, Json],  # decimals as text, `seed` as text; `adjusted` lists clamped values old → new
    guardrails: Sequence[GuardrailEntry],
    limits: Sequence[LimitEntry],
    prompt_tokens: int,
    identities: Mapping[str, str],  # subject, source
    prompt: bytes,  # the request body as sent
    prompt_to_model: bytes,  # the rendered text after redaction; of embeddings, a JSON list of texts
) -> Record:
    return Record(
        type=RecordType.REQUEST_RECEIVED,
        tenant=tenant,
        request_id=request_id,
        body={
            "action": action,
            "stream": stream,
            "principal": _said(principal),
            "decision": _said(decision),
            "model": _said(model),
            "sampling": sampling,
            "guardrails": list(map(_said, guardrails)),
            "limits": list(map(_said, limits)),
            "prompt_tokens": prompt_tokens,
        },
        identities=identities,
        parts={"prompt": prompt, "prompt_to_model": prompt_to_model},
    )


def request_denied(
    *,
    tenant: str,
    request_id: str,
    action: str,
    principal: PrincipalEntry,
    decision: DecisionEntry,
    code: str,  # the error code sent, e.g. policy_denied
    model_alias: str,
    guardrails: Sequence[GuardrailEntry],
    identities: Mapping[str, str],
    prompt: bytes | None,  # None where it was refused before anybody read it
) -> Record:
    return Record(
        type=RecordType.REQUEST_DENIED,
        tenant=tenant,
        request_id=request_id,
        body={
            "action": action,
            "principal": _said(principal),
            "decision": _said(decision),
            "code": code,
            "model": {"alias": model_alias},
            "guardrails": list(map(_said, guardrails)),
        },
        identities=identities,
        parts={} if prompt is None else {"prompt": prompt},
    )


def request_completed(
    *,
    tenant: str,
    request_id: str,
    status: str,  # completed | cancelled
    choices: Sequence[ChoiceEntry],
    usage: Mapping[str, int],  # prompt_tokens, cached_tokens, completion_tokens
    guardrails: Sequence[GuardrailEntry],
    limits: Sequence[LimitEntry],
    timings: TimingEntry,
    output: bytes,  # canonical JSON list, one member a choice: exactly the text that was released; a vector in base64
    output_tokens: bytes,  # JSON list of lists of token ids as generated, for replay
    logprobs: bytes | None = None,  # JSON: what is told of tokens beside the text; None where nothing is
) -> Record:
    return Record(
        type=RecordType.REQUEST_COMPLETED,
        tenant=tenant,
        request_id=request_id,
        body={
            "status": status,
            "choices": list(map(_said, choices)),
            "usage": usage,
            "guardrails": list(map(_said, guardrails)),
            "limits": list(map(_said, limits)),
            "timings": _said(timings),
        },
        parts={"output": output, "output_tokens": output_tokens} | _told(logprobs),
    )


def request_failed(
    *,
    tenant: str,
    request_id: str,
    code: str,  # engine_unavailable | suspended | …
    timings: TimingEntry,
    output: bytes,
    guardrails: Sequence[GuardrailEntry] = (),
    logprobs: bytes | None = None,
) -> Record:
    return Record(
        type=RecordType.REQUEST_FAILED,
        tenant=tenant,
        request_id=request_id,
        body={"code": code, "timings": _said(timings), "guardrails": list(map(_said, guardrails))},
        parts={"output": output} | _told(logprobs),
    )


def _told(logprobs: bytes | None) -> dict[str, bytes]:
    return {} if logprobs is None else {"logprobs": logprobs}
