"""Guardrails for tests: specs in one line, values that must be found, and an answer streamed through an inspector."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from policies.decision import Action, GuardrailSpec, Stage, StreamingMode
from policies.guardrails import OutputInspector

# Test numbers that the issuers publish, and values made for these tests. None belongs to anybody.
CARDS = ("4111 1111 1111 1111", "4111111111111111", "5555-5555-5555-4444", "378282246310005", "4222222222222")
IBANS = ("GB82 WEST 1234 5698 7654 32", "DE89370400440532013000", "NO93 8601 1117 947")
PERSONAL = (*CARDS, *IBANS, "mia@example.com", "+49 30 901820", "(415) 555-2671", "219-09-9998")
KEY_BODY = "MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEAAoIBAQC7"
SECRETS = (
    "AKIAIOSFODNN7EXAMPLE",
    "ghp_" + "a1B2" * 9,
    "xoxb-" + "1234567890-abcdef",
    "glpat-" + "a1B2" * 5,
    "AIza" + "a1B2c" * 7,
    "sk_live_" + "a1B2" * 6,
    f"-----BEGIN PRIVATE KEY-----\n{KEY_BODY}\n-----END PRIVATE KEY-----",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P",
    "password = hunter2-Tr0ub4dor",
)


def input_spec(id: str, detector: str, action: Action, entities: Iterable[str] = ()) -> GuardrailSpec:
    return GuardrailSpec(id, detector, Stage.INPUT, action, tuple(sorted(entities)), None, 0)


def output_spec(
    id: str,
    detector: str,
    action: Action,
    entities: Iterable[str] = (),
    mode: StreamingMode = StreamingMode.WINDOW,
    hold_chars: int = 0,
) -> GuardrailSpec:
    streaming = None if action is Action.FLAG else mode
    return GuardrailSpec(id, detector, Stage.OUTPUT, action, tuple(sorted(entities)), streaming, hold_chars)


@dataclass(frozen=True)
class Streamed:
    text: str
    halted_by: str | None
    counts: list[Mapping[str, int]]


def stream(chunks: Iterable[str], specs: Sequence[GuardrailSpec]) -> Streamed:
    """Inspect the chunks; the last one comes with the end, as an answer's does that nobody streams."""
    *first, last = [*chunks] or [""]
    inspector = OutputInspector(specs)
    text = "".join([*map(inspector.push, first), inspector.finish(last)])
    return Streamed(text, inspector.halted_by, [verdict.counts for verdict in inspector.verdicts()])
