"""Inspection: what the model may see, what may leave, and what the verdict says of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from policies.decision import Action, Stage, StreamingMode
from policies.guardrails import Outcome, OutputInspector, inspect_input
from tests.support.guardrails import CARDS, IBANS, input_spec, output_spec, stream

CARD = CARDS[0]


def pairs(text: str) -> Iterator[tuple[str, str]]:
    return ((text[:cut], text[cut:]) for cut in range(len(text) + 1))


def test_input_is_redacted_where_it_was_found_and_nowhere_else() -> None:
    text = f"I am mia@example.com, card {CARD}, IBAN {IBANS[0]}."
    told = inspect_input(text, [input_spec("pii-in", "pii", Action.REDACT)])
    assert told.text == "I am [EMAIL], card [CARD], IBAN [IBAN]."
    assert told.blocked_by is None
    assert told.verdicts[0].outcome is Outcome.REDACTED
    assert told.verdicts[0].counts == {"email": 1, "card": 1, "iban": 1}


def test_input_that_is_flagged_stays_as_it_is() -> None:
    told = inspect_input(CARD, [input_spec("g", "pii", Action.FLAG)])
    assert (told.text, told.blocked_by, told.verdicts[0].outcome) == (CARD, None, Outcome.FLAGGED)


def test_a_block_names_the_guardrail_and_the_others_ran_too() -> None:
    specs = [input_spec("a", "pii", Action.REDACT), input_spec("b", "secrets", Action.BLOCK)]
    told = inspect_input("mia@example.com AKIAIOSFODNN7EXAMPLE", specs)
    assert told.blocked_by == "b"
    assert [verdict.outcome for verdict in told.verdicts] == [Outcome.REDACTED, Outcome.BLOCKED]


def test_only_the_entities_that_are_named_are_looked_for() -> None:
    told = inspect_input(f"{CARD} mia@example.com", [input_spec("g", "pii", Action.REDACT, ("email",))])
    assert told.text == f"{CARD} [EMAIL]"


def test_clean_text_passes_and_says_so() -> None:
    told = inspect_input("when do you open?", [input_spec("g", "pii", Action.BLOCK)])
    assert (told.text, told.verdicts[0].outcome, told.verdicts[0].counts) == ("when do you open?", Outcome.PASSED, {})


def test_guardrails_of_the_other_stage_are_left_alone() -> None:
    spec = output_spec("g", "pii", Action.BLOCK)
    assert inspect_input(CARD, [spec]).verdicts == ()
    assert stream([CARD], [input_spec("g", "pii", Action.BLOCK)]).text == CARD


def test_a_detector_that_fails_blocks_the_input_and_says_error() -> None:
    told = inspect_input("hello", [replace(input_spec("g", "pii", Action.FLAG), detector="gone")])
    assert told.blocked_by == "g"
    assert told.verdicts[0].outcome is Outcome.ERROR


@pytest.mark.parametrize("action", list(Action))
def test_a_detector_that_fails_halts_the_output_and_says_error(action: Action) -> None:
    broken = replace(output_spec("broken", "pii", action, ("card",)), detector="gone")
    inspector = OutputInspector([output_spec("sound", "pii", Action.REDACT, ("card",)), broken])
    assert (inspector.push("x" * 1_000), inspector.finish()) == ("", "")
    assert inspector.halted_by == "broken"
    assert [verdict.outcome for verdict in inspector.verdicts()] == [Outcome.NOT_RUN, Outcome.ERROR]


@pytest.mark.parametrize("number", [*CARDS, *IBANS, CARD.replace(" ", "\u00a0"), CARD.replace(" ", "\u200b")])
@pytest.mark.parametrize("action", [Action.BLOCK, Action.REDACT])
def test_a_number_split_over_any_two_chunks_never_leaves(number: str, action: Action) -> None:
    spec = output_spec("g", "pii", action, ("card", "iban"), hold_chars=96)
    before, after = "your number is ", " and that is all there is to say about it" * 4
    for first, second in pairs(before + number + after):
        told = stream([first, second], [spec])
        if action is Action.BLOCK:
            assert (told.text, told.halted_by) == (before, "g")
        else:
            marker = "[IBAN]" if number[0].isalpha() else "[CARD]"
            assert (told.text, told.halted_by) == (before + marker + after, None)


def test_a_number_that_ends_the_answer_never_leaves() -> None:
    for action in (Action.BLOCK, Action.REDACT):
        told = stream(list(f"it is {CARD}"), [output_spec("g", "pii", action, ("card",))])
        assert told.text == ("it is " if action is Action.BLOCK else "it is [CARD]")


def test_no_more_is_held_than_the_policy_says() -> None:
    inspector = OutputInspector([output_spec("g", "pii", Action.REDACT, ("card",), hold_chars=100)])
    assert inspector.push("1" * 100) == ""
    assert inspector.push("2" * 7) == "1" * 7


def test_text_in_which_nothing_can_begin_leaves_at_once() -> None:
    inspector = OutputInspector([output_spec("g", "pii", Action.REDACT, ("card",), hold_chars=256)])
    assert inspector.push("The fee is ") == "The fee is "
    assert inspector.push("12") == ""
    assert inspector.push(" euros") == "12 euros"


def test_what_only_flags_sees_what_halted_and_nothing_behind_it() -> None:
    specs = [
        output_spec("cards", "pii", Action.BLOCK, ("card",)),
        output_spec("all", "pii", Action.FLAG, ("card", "email")),
    ]
    text = f"mia@example.com, {CARD}, noah@example.com"
    expected = ("mia@example.com, ", "cards", [{"card": 1}, {"email": 1, "card": 1}])
    for told in (stream([text], specs), stream(list(text), specs)):
        assert (told.text, told.halted_by, told.counts) == expected


def test_hold_chars_below_the_longest_span_do_not_weaken_the_hold() -> None:
    inspector = OutputInspector([output_spec("g", "pii", Action.REDACT, ("card",), hold_chars=1)])
    assert inspector.push("4111 1111 1111") == ""


def test_hold_all_releases_nothing_before_the_end() -> None:
    inspector = OutputInspector([output_spec("g", "pii", Action.REDACT, ("card",), StreamingMode.HOLD_ALL)])
    assert inspector.push("x" * 10_000) == ""
    assert inspector.push(CARD) == ""
    assert inspector.finish() == "x" * 10_000 + "[CARD]"


def test_hold_all_that_blocks_releases_nothing_at_all() -> None:
    told = stream(["fine so far ", CARD], [output_spec("g", "pii", Action.BLOCK, ("card",), StreamingMode.HOLD_ALL)])
    assert (told.text, told.halted_by, told.counts) == ("", "g", [{"card": 1}])


def test_once_halted_nothing_leaves_any_more() -> None:
    inspector = OutputInspector([output_spec("g", "pii", Action.BLOCK, ("card",))])
    released = inspector.push(CARD + "." * 100)
    assert (released, inspector.halted_by) == ("", "g")
    assert inspector.push("more") == ""
    assert inspector.finish() == ""
    assert inspector.verdicts()[0].outcome is Outcome.BLOCKED


def test_a_flag_delays_nothing_and_still_sees_what_is_split() -> None:
    inspector = OutputInspector([output_spec("g", "secrets", Action.FLAG)])
    for piece in ("the key is AKIAIOSF", "ODNN7EXAMPLE", "."):
        assert inspector.push(piece) == piece
    assert inspector.finish() == ""
    assert inspector.verdicts()[0].outcome is Outcome.FLAGGED
    assert inspector.verdicts()[0].counts == {"aws_key": 1}


def test_not_run_is_never_passed() -> None:
    specs = [output_spec("a", "pii", Action.REDACT, ("card",)), output_spec("b", "secrets", Action.FLAG)]
    inspector = OutputInspector(specs)
    assert [verdict.outcome for verdict in inspector.verdicts()] == [Outcome.NOT_RUN, Outcome.NOT_RUN]
    inspector.push("hello")
    assert [verdict.outcome for verdict in inspector.verdicts()] == [Outcome.NOT_RUN, Outcome.NOT_RUN]
    inspector.finish()
    assert [verdict.outcome for verdict in inspector.verdicts()] == [Outcome.PASSED, Outcome.PASSED]


def test_verdicts_come_in_the_order_of_the_policy() -> None:
    specs = [output_spec("a", "pii", Action.FLAG), output_spec("b", "pii", Action.REDACT, ("card",))]
    verdicts = OutputInspector(specs).verdicts()
    assert [(verdict.guardrail, verdict.stage) for verdict in verdicts] == [("a", Stage.OUTPUT), ("b", Stage.OUTPUT)]


def test_findings_that_overlap_are_one_marker_and_one_count() -> None:
    told = inspect_input("call (415) 555-2671 now", [input_spec("g", "pii", Action.REDACT)])
    assert (told.text, told.verdicts[0].counts) == ("call [PHONE] now", {"phone": 1})


def test_choices_do_not_share_an_inspectors_state() -> None:
    specs = [output_spec("g", "pii", Action.BLOCK, ("card",))]
    first, second = OutputInspector(specs), OutputInspector(specs)
    first.push(CARD + "." * 100)
    assert (first.halted_by, second.halted_by) == ("g", None)


def test_text_without_guardrails_flows_through() -> None:
    inspector = OutputInspector([])
    assert (inspector.push("a"), inspector.finish(), inspector.verdicts()) == ("a", "", ())
