from __future__ import annotations

import pytest

from engine.generation import Generation
from engine.replay import ReplayDigest
from engine.request import FinishReason, TokenDelta, TokenLogprob
from engine.sequence import Sequence
from tests.support.byte_tokenizer import EOS, detokenizer_for
from tests.support.engine_core import make_request

EOS_IDS = frozenset({EOS})


def make_generation(max_tokens: int = 100, context_length: int = 1000, **sampling: object) -> Generation:
    request = make_request("r", [1, 2, 3], max_tokens, **sampling)
    sequence = Sequence(request, 0, EOS_IDS)
    return Generation(sequence, detokenizer_for(request.sampling), context_length=context_length, arrived_at=10.0)


def accept(generation: Generation, token: int, now: float = 20.0) -> TokenDelta:
    generation.sequence.take(token)
    return generation.accept([TokenLogprob(token, -0.5)], now)


def accept_text(generation: Generation, text: str) -> list[TokenDelta]:
    return [accept(generation, byte) for byte in text.encode()]


def test_the_end_of_sequence_token_is_counted_but_is_no_text() -> None:
    generation = make_generation()
    accept_text(generation, "ab")
    last = accept(generation, EOS)
    assert (last.text, last.tokens, last.finish_reason) == ("", (EOS,), FinishReason.STOP)
    assert last.stats is not None
    assert last.stats.output_tokens == 3


def test_an_ignored_end_of_sequence_token_ends_nothing() -> None:
    assert accept(make_generation(ignore_eos=True), EOS).finish_reason is None


def test_a_stop_string_is_held_back_and_dropped() -> None:
    deltas = accept_text(make_generation(stop=("END",)), "xEEND")
    assert "".join(delta.text for delta in deltas) == "xE"
    assert [delta.finish_reason for delta in deltas] == [None] * 4 + [FinishReason.STOP]


def test_a_stop_string_on_the_last_allowed_token_is_a_stop() -> None:
    deltas = accept_text(make_generation(max_tokens=3, stop=("END",)), "END")
    assert deltas[-1].finish_reason is FinishReason.STOP
    assert "".join(delta.text for delta in deltas) == ""


@pytest.mark.parametrize("ending", ["length", "eos", "abort"])
def test_text_held_back_is_let_go_at_any_other_end(ending: str) -> None:
    generation = make_generation(max_tokens=2 if ending == "length" else 50, stop=("END",))
    text = "".join(delta.text for delta in accept_text(generation, "EN"))
    if ending == "eos":
        text += accept(generation, EOS).text
    if ending == "abort":
        text += generation.abort(30.0).text
    assert text == "EN"


@pytest.mark.parametrize(("max_tokens", "context_length"), [(4, 1000), (900, 7)])
def test_length_is_reached_by_max_tokens_or_by_the_context(max_tokens: int, context_length: int) -> None:
    deltas = accept_text(make_generation(max_tokens, context_length), "abcd")
    assert [delta.finish_reason for delta in deltas] == [None, None, None, FinishReason.LENGTH]


def test_a_character_of_several_tokens_appears_once_it_is_whole() -> None:
    assert [delta.text for delta in accept_text(make_generation(), "é€")] == ["", "é", "", "", "€"]


def test_times_count_from_arrival_and_only_the_first_admission_counts() -> None:
    generation = make_generation(max_tokens=2)
    generation.admitted(12.0)
    generation.admitted(19.0)
    accept(generation, 65, now=20.0)
    stats = accept(generation, 65, now=25.0).stats
    assert stats is not None
    assert (stats.queued_s, stats.first_token_s, stats.total_s) == (2.0, 10.0, 15.0)


def test_a_request_aborted_while_waiting_spent_all_its_time_queued() -> None:
    stats = make_generation().abort(17.0).stats
    assert stats is not None
    assert (stats.queued_s, stats.first_token_s, stats.total_s, stats.output_tokens) == (7.0, 7.0, 7.0, 0)
    assert stats.replay_digest == ReplayDigest().hexdigest()


def test_logprobs_appear_only_when_asked_for_and_the_digest_does_not_depend_on_it() -> None:
    with_logprobs, without = make_generation(max_tokens=1), make_generation(max_tokens=1, logprobs=False)
    one, two = accept(with_logprobs, 65), accept(without, 65)
    assert (len(one.logprobs), len(two.logprobs)) == (1, 0)
    assert one.stats is not None
    assert two.stats is not None
    assert one.stats.replay_digest == two.stats.replay_digest
