"""Laws of inspection: no cut of an answer changes what leaves, and the fast prefilter changes nothing at all."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import example, given, settings
from hypothesis import strategies as st

from policies.decision import Action, GuardrailSpec, StreamingMode
from policies.guardrails import OutputInspector, inspect_input
from policies.guardrails.detectors import DETECTORS, longest_span
from policies.guardrails.fold import fold
from policies.guardrails.pattern import CONTEXT, Prefilter
from tests.support.guardrails import CARDS, IBANS, PERSONAL, SECRETS, input_spec, output_spec, stream

# Small change that stands next to findings, glues them together, or hides them.
NOISE = st.sampled_from(
    [" ", "-", ".", ",", "\n", "1", "23", "4", "x", "É", "@", "+", "(", "\u200b", "\u00ad", "\x00", "\ufe0f", "：", "٤",
     "eyJ", "xoxb-", "AKIA", "password=", "-----", "{}", "\ud800", "漢字", "𝟒"]
)  # fmt: skip
PIECES = st.one_of(NOISE, st.sampled_from([*PERSONAL, *SECRETS]), st.text(max_size=5))
TEXTS = st.lists(PIECES, max_size=14).map("".join)
PREFILTERS = {
    name: (Prefilter(one.known), Prefilter(one.known, use_hyperscan=False)) for name, one in DETECTORS.items()
}
ALONE = [(entity, Prefilter([entity])) for one in DETECTORS.values() for entity in one.known]
SMALL_PII = ("card", "iban", "phone", "ssn")  # a short hold: more of the text is final while it streams


def cut_at(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[start:end] for start, end in pairwise(edges)]


OUTPUT_SPECS = st.lists(
    st.sampled_from(
        [
            output_spec("card-out", "pii", Action.REDACT, ("card",)),
            output_spec("card-block", "pii", Action.BLOCK, ("card",)),
            output_spec("iban-block", "pii", Action.BLOCK, ("iban",)),
            output_spec("pii-out", "pii", Action.REDACT, SMALL_PII),
            output_spec("pii-flag", "pii", Action.FLAG, ()),
            output_spec("tokens-out", "secrets", Action.REDACT, ("aws_key", "password", "slack_token")),
            output_spec("hold", "pii", Action.REDACT, ("ssn",), StreamingMode.HOLD_ALL),
        ]
    ),
    min_size=1,
    max_size=3,
    unique_by=lambda spec: spec.id,
)


@settings(max_examples=300)
@given(TEXTS, st.lists(st.integers(0, 10_000), max_size=12), OUTPUT_SPECS)
def test_any_split_of_an_answer_gives_the_same_total_output(
    text: str, cuts: list[int], specs: list[GuardrailSpec]
) -> None:
    whole = stream([text], specs)
    assert stream(cut_at(text, cuts), specs) == whole
    assert stream(list(text), specs) == whole


@settings(max_examples=200)
@given(TEXTS, st.sampled_from([("pii", SMALL_PII), ("pii", ()), ("secrets", ())]))
def test_a_streamed_redaction_equals_the_redaction_of_the_whole(
    text: str, looked_for: tuple[str, tuple[str, ...]]
) -> None:
    detector, entities = looked_for
    whole = inspect_input(text, [input_spec("g", detector, Action.REDACT, entities)])
    streamed = stream(list(text), [output_spec("g", detector, Action.REDACT, entities)])
    assert streamed.text == whole.text
    assert streamed.counts == [whole.verdicts[0].counts]


@settings(max_examples=200)
@given(st.sampled_from([*CARDS, *IBANS]), TEXTS, TEXTS, st.lists(st.integers(0, 10_000), max_size=6))
def test_no_part_of_a_blocked_number_leaves(number: str, before: str, after: str, cuts: list[int]) -> None:
    spec = output_spec("g", "pii", Action.BLOCK, ("card", "iban"))
    text = f"{before}|{number}|{after}"
    told = stream(cut_at(text, cuts), [spec])
    assert told.halted_by == "g"
    assert text.startswith(told.text)
    assert len(told.text) <= len(before) + 1


@settings(max_examples=300)
@given(TEXTS)
@example("12" * 40 + "@")
def test_what_was_released_was_scanned_with_all_that_may_follow(text: str) -> None:
    """Delivered ≤ scanned: at any moment, what left is the start of the redaction of any continuation."""
    inspector = OutputInspector([output_spec("g", "pii", Action.REDACT, SMALL_PII)])
    released = "".join(inspector.push(character) for character in text)
    for continuation in ("", "1", "4111 1111 1111 1111", "-22-3333 and more"):
        whole = inspect_input(text + continuation, [input_spec("g", "pii", Action.REDACT, SMALL_PII)]).text
        assert whole.startswith(released)


@settings(max_examples=500)
@given(TEXTS, TEXTS, st.integers(0, 10_000))
def test_what_is_settled_stays_as_it_is_whatever_follows(text: str, more: str, cut: int) -> None:
    """Cut anywhere, and within every finding: before the settled position, the cut text shows what the whole will."""
    whole = fold(text + more).text
    for entity, prefilter in ALONE:
        found = set(entity.find(whole))
        within = {position for start, end in found for position in range(start + 1, min(end + 2, start + 64))}
        for position in {cut, *within}:
            known = whole[: position % (len(whole) + 1)]
            settled = prefilter.settled(known)
            early = {span for span in entity.find(known) if span[0] < settled}
            assert early == {span for span in found if span[0] < settled}


@settings(max_examples=300)
@given(TEXTS, st.sampled_from(sorted(DETECTORS)))
def test_hyperscan_and_re2_let_the_same_findings_pass(text: str, detector: str) -> None:
    known = DETECTORS[detector].known
    folded = fold(text).text
    expected = {entity.name for entity in known if any(True for _ in entity.find(folded))}
    for prefilter in PREFILTERS[detector]:
        candidates = {entity.name: entity for entity in prefilter.candidates(folded)}
        assert expected == {name for name, entity in candidates.items() if any(True for _ in entity.find(folded))}


@settings(max_examples=200)
@given(TEXTS)
def test_no_finding_is_longer_than_its_detector_says(text: str) -> None:
    for name, detector in DETECTORS.items():
        for entity in detector.known:
            for start, end in entity.find(fold(text).text):
                assert 0 < end - start <= entity.longest <= (longest_span(name, ()) or 0)


@settings(max_examples=200)
@given(TEXTS, st.integers(0, 10_000))
def test_finders_are_local(text: str, cut: int) -> None:
    """A finding depends on `CONTEXT` characters before it at most: cutting off more changes only what begins there."""
    folded = fold(text).text
    drop = cut % (len(folded) + 1)
    tail = folded[drop:]
    for detector in DETECTORS.values():
        for entity in detector.known:
            whole = {(s - drop, e - drop) for s, e in entity.find(folded) if s - drop >= CONTEXT}
            part = {(s, e) for s, e in entity.find(tail) if s >= CONTEXT}
            covered = {p for s, e in entity.find(folded) if s - drop < CONTEXT for p in range(s - drop, e - drop)}
            assert {span for span in whole ^ part if span[0] not in covered} == set()


@settings(max_examples=300)
@given(st.text(max_size=40) | TEXTS)
def test_folding_twice_changes_nothing_and_spans_lead_back(text: str) -> None:
    folded = fold(text)
    assert fold(folded.text).text == folded.text
    spans = [folded.original_span(position, position + 1) for position in range(len(folded.text))]
    assert all(end == start + 1 for start, end in spans)
    assert [fold(text[start:end]).text for start, end in spans] == list(folded.text)
    seen = {start for start, _ in spans}
    assert all(fold(character).text == "" for at, character in enumerate(text) if at not in seen)
