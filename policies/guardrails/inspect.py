"""Inspection: guardrails over a prompt at once, and over an answer while it streams.

Streaming keeps one rule: *delivered ≤ scanned*. What may still be part of a match is held: from where the end of the
text looks like the beginning of one, at most the last `hold_chars` characters. Every finder is local (pattern.py):
what starts at a place is final once its `longest` characters are known, and before that where the text is settled.
Only what is final is released or acted upon. So the released text is the same however the answer was cut into chunks,
a number that is split over any two of them never leaves, and a finding that blocks lets out what stood before it and
nothing of itself.

Matches that overlap are one finding with one marker. "Not run" is never "passed": an answer that ends early was
scanned as far as it goes, and says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from policies.decision import Action, GuardrailSpec, Stage, StreamingMode
from policies.guardrails.detectors import chosen, longest_span, prefilter
from policies.guardrails.fold import Folded, fold
from policies.guardrails.pattern import CONTEXT, Entity


class Outcome(StrEnum):
    PASSED = "passed"
    FLAGGED = "flagged"
    REDACTED = "redacted"
    BLOCKED = "blocked"
    ERROR = "error"  # the detector failed: it blocks
    NOT_RUN = "not_run"


@dataclass(frozen=True, slots=True)
class Verdict:
    guardrail: str
    detector: str
    stage: Stage
    action: Action
    outcome: Outcome
    counts: Mapping[str, int]  # entity → findings


@dataclass(frozen=True, slots=True)
class InputInspection:
    text: str  # for the model
    verdicts: tuple[Verdict, ...]
    blocked_by: str | None


@dataclass(frozen=True, slots=True, order=True)
class _Span:
    start: int
    end: int
    entity: str
    guardrail: int  # position among the specs


# What passed here and did not run there has not passed.
_SEVERITY = (Outcome.PASSED, Outcome.NOT_RUN, Outcome.FLAGGED, Outcome.REDACTED, Outcome.BLOCKED, Outcome.ERROR)
_OUTCOMES = {Action.BLOCK: Outcome.BLOCKED, Action.REDACT: Outcome.REDACTED, Action.FLAG: Outcome.FLAGGED}


def inspect_input(text: str, specs: Sequence[GuardrailSpec]) -> InputInspection:
    """Return what the model may see of `text`, as rendered by the chat template, under the input guardrails."""
    own = [spec for spec in specs if spec.stage is Stage.INPUT]
    spans, failed = _spans(text, own)
    verdicts = tuple(_verdict(spec, _counts(spans, at), at in failed) for at, spec in enumerate(own))
    blocked = next((v.guardrail for v in verdicts if v.outcome in (Outcome.BLOCKED, Outcome.ERROR)), None)
    redacted = [span for span in spans if own[span.guardrail].action is Action.REDACT]
    return InputInspection(_redact(text, _merge(redacted)), verdicts, blocked)


def merged(inspections: Sequence[Sequence[Verdict]]) -> tuple[Verdict, ...]:
    """Return one verdict a guardrail on several texts that the same ones looked at: findings add up, the worst outcome
    stands for all."""
    if len(inspections) == 1:
        return tuple(inspections[0])
    together = []
    for verdicts in zip(*inspections, strict=True):
        counts: Counter[str] = Counter()
        for verdict in verdicts:
            counts.update(verdict.counts)
        worst = max((verdict.outcome for verdict in verdicts), key=_SEVERITY.index)
        together.append(replace(verdicts[0], outcome=worst, counts=dict(counts)))
    return tuple(together)


class OutputInspector:
    """One choice's output guardrails. Text goes in as it is generated; what may leave comes out.

    Guardrails that only flag look in a stream of their own at what the enforcing ones let pass or halted at: so they
    delay nothing, and what they find does not depend on the chunks either.
    """

    def __init__(self, specs: Iterable[GuardrailSpec]) -> None:
        own = [spec for spec in specs if spec.stage is Stage.OUTPUT]
        self._order = [spec.id for spec in own]
        self._enforcing = _Stream([spec for spec in own if spec.withholds_output])
        self._flagging = _Stream([spec for spec in own if not spec.withholds_output])

    @property
    def halted_by(self) -> str | None:
        """The guardrail that ended the answer, by a finding or because its detector failed."""
        return self._enforcing.halted_by or self._flagging.halted_by

    def push(self, text: str) -> str:
        """Take newly generated text and return what may be released now; nothing, once halted."""
        if self.halted_by is not None:
            return ""
        released = self._enforcing.push(text)
        self._flagging.push(self._enforcing.seen)
        if self._enforcing.halted_by is not None:
            self._flagging.finish()
        return released if self._flagging.halted_by is None else ""

    def finish(self, text: str = "") -> str:
        """Take the last of the text: everything is final now. Return the rest that may be released."""
        if self.halted_by is not None:
            return ""
        released = self._enforcing.finish(text)
        self._flagging.push(self._enforcing.seen)
        self._flagging.finish()
        return released if self._flagging.halted_by is None else ""

    def verdicts(self) -> tuple[Verdict, ...]:
        ended = self.halted_by is not None
        verdicts = {
            verdict.guardrail: verdict for one in (self._enforcing, self._flagging) for verdict in one.verdicts(ended)
        }
        return tuple(verdicts[guardrail] for guardrail in self._order)


class _Stream:
    """Text in, final text out. Only what is final is acted upon: so it does not matter how the text was cut."""

    def __init__(self, specs: list[GuardrailSpec]) -> None:
        self._specs = specs
        self._hold_all = any(spec.mode is StreamingMode.HOLD_ALL for spec in specs)
        self._context = ""  # folded; the last released characters: what a finder looks at before a start
        self._held = ""
        self.seen = ""  # as generated: what the last call decided, up to the end of what halted
        self._counts: list[Counter[str]] = [Counter() for _ in specs]
        self._failed: set[int] = set()
        self._scanned = False
        self._finished = False
        self.halted_by: str | None = None
        self._hold = max((self._longest(position) for position in range(len(specs))), default=0)

    def _longest(self, position: int) -> int:
        """Return how much a guardrail holds: what the policy says, and never less than its longest match."""
        spec = self._specs[position]
        try:
            return max(spec.hold_chars, longest_span(spec.detector, spec.entities) or 0)
        except Exception:  # fail closed, as above
            self._fail(position)
            return spec.hold_chars

    def push(self, text: str) -> str:
        self.seen = "" if self._specs else text
        if not self._specs:
            return text
        if self.halted_by is not None:
            return ""
        self._held += text
        if self._hold_all:
            return ""
        return self._release(self._final())

    def finish(self, text: str = "") -> str:
        self._finished = True
        self.seen = "" if self._specs else text
        if not self._specs:
            return text
        if self.halted_by is not None:
            return ""
        self._held += text
        return self._release(len(self._held))

    def verdicts(self, ended: bool) -> list[Verdict]:
        ran = self._finished or (ended and self._scanned)
        return [_verdict(spec, self._counts[at], at in self._failed, ran=ran) for at, spec in enumerate(self._specs)]

    def _final(self) -> int:
        """Return the position before which no match can still begin or grow. What folds to nothing does not count."""
        folded = fold(self._held)
        try:
            looks_settled = prefilter(*map(_wanted, self._specs)).settled(folded.text)
        except Exception:  # fail closed: `_scan` will fail on the same text, and say so
            looks_settled = 0
        settled = max(looks_settled, len(folded.text) - self._hold)
        if folded.origins is None:
            return settled
        return folded.origins[settled] if settled < len(folded.origins) else len(self._held)

    def _release(self, final: int) -> str:
        """Release the held text before `final`, or before the first finding that reaches over it or halts."""
        if final <= 0:
            return ""
        spans = self._scan()
        if self.halted_by is not None:
            return ""
        if not spans:
            return self._let_go(final, spans)
        clusters = _merge(spans)
        cut = min([final, *(first.start for first, end in clusters if first.start < final < end)])
        halting = next((s for s in sorted(spans) if s.start < cut and self._blocks(s)), None)
        if halting is not None:
            return self._halt(halting, spans, next(f.start for f, end in clusters if f.start <= halting.start < end))
        return self._let_go(cut, spans)

    def _let_go(self, cut: int, spans: list[_Span]) -> str:
        self.seen = released = self._held[:cut]
        if passed := [span for span in spans if span.start < cut]:
            self._count(passed)
            redacted = [span for span in passed if self._specs[span.guardrail].action is Action.REDACT]
            released = _redact(self.seen, _merge(redacted))
        self._context = (self._context + fold(self.seen).text)[-CONTEXT:]
        self._held = self._held[cut:]
        return released

    def _halt(self, span: _Span, spans: list[_Span], cut: int) -> str:
        """End the answer: what stands before the finding may leave, unless the answer leaves whole or not at all."""
        seen = self._held[: span.end]
        released = "" if self._hold_all else self._let_go(cut, spans)
        self.seen = seen
        self._count([span])
        self.halted_by = self._specs[span.guardrail].id
        self._held = ""
        return released

    def _blocks(self, span: _Span) -> bool:
        return self._specs[span.guardrail].action is Action.BLOCK

    def _scan(self) -> list[_Span]:
        """Return the findings that start in the held text, in its positions."""
        known = len(self._context)
        text = self._context + self._held
        spans, failed = _spans(text, self._specs)
        for position in sorted(failed):
            self._fail(position)
        self._scanned = True
        return [_Span(s.start - known, s.end - known, s.entity, s.guardrail) for s in spans if s.start >= known]

    def _fail(self, position: int) -> None:
        self._failed.add(position)
        self.halted_by = self.halted_by or self._specs[position].id
        self._held = ""

    def _count(self, spans: Iterable[_Span]) -> None:
        found = list(spans)
        for position, counts in enumerate(self._counts):
            counts.update(_counts(found, position))


def _wanted(spec: GuardrailSpec) -> tuple[str, tuple[str, ...]]:
    return spec.detector, spec.entities


def _spans(text: str, specs: Sequence[GuardrailSpec]) -> tuple[list[_Span], set[int]]:
    """Return what guardrails find, and which of them failed: fail closed, whatever a library does. The verdict of a
    failed one says `error`, and it blocks."""
    if not specs:
        return [], set()
    spans: list[_Span] = []
    failed: set[int] = set()
    try:  # all in one pass: a look at a short text costs little beside asking for it
        folded = fold(text)
        occurring = prefilter(*map(_wanted, specs)).candidates(folded.text)
    except Exception:  # of whichever library: nobody has looked, so nobody has passed it
        return [], set(range(len(specs)))
    for position, spec in enumerate(specs if occurring else ()):
        try:
            spans += _found(folded, spec, position, occurring)
        except Exception:  # this one alone has not looked
            failed.add(position)
    return spans, failed


def _found(folded: Folded, spec: GuardrailSpec, position: int, occurring: Sequence[Entity]) -> list[_Span]:
    wanted = chosen(spec.detector, spec.entities)
    return [
        _Span(*folded.original_span(start, end), entity.name, position)
        for entity in occurring
        if entity in wanted
        for start, end in entity.find(folded.text)
    ]


def _merge(spans: Iterable[_Span]) -> list[tuple[_Span, int]]:
    """Join overlapping spans: (the first of each, where the last of each ends), in order."""
    merged: list[tuple[_Span, int]] = []
    for span in sorted(spans, key=lambda s: (s.start, -s.end, s.entity)):
        if merged and span.start < merged[-1][1]:
            first, end = merged[-1]
            merged[-1] = (first, max(end, span.end))
        else:
            merged.append((span, span.end))
    return merged


def _redact(text: str, clusters: Iterable[tuple[_Span, int]]) -> str:
    pieces: list[str] = []
    at = 0
    for first, end in clusters:
        pieces += (text[at : first.start], f"[{first.entity.upper()}]")
        at = end
    return "".join([*pieces, text[at:]])


def _counts(spans: Iterable[_Span], position: int) -> Counter[str]:
    """Count findings by entity. Those that overlap are one: a number may be found from two of its places."""
    by_entity: dict[str, list[_Span]] = {}
    for span in spans:
        if span.guardrail == position:
            by_entity.setdefault(span.entity, []).append(span)
    return Counter({entity: len(_merge(found)) for entity, found in by_entity.items()})


def _verdict(spec: GuardrailSpec, counts: Mapping[str, int], failed: bool, *, ran: bool = True) -> Verdict:
    if failed:
        outcome = Outcome.ERROR
    elif counts:
        outcome = _OUTCOMES[spec.action]
    else:
        outcome = Outcome.PASSED if ran else Outcome.NOT_RUN
    return Verdict(spec.id, spec.detector, spec.stage, spec.action, outcome, dict(counts))
