from __future__ import annotations

from dataclasses import replace

from engine.blocks import chain_key, root_key
from engine.plan import Draw
from engine.sequence import Sequence, SequenceStatus
from tests.support.engine_core import make_request


def make_sequence(length: int) -> Sequence:
    return Sequence(make_request("r", list(range(length)), salt=b"s"), arrival=0)


def test_a_new_sequence_waits_with_its_whole_prompt_pending() -> None:
    sequence = make_sequence(20)
    assert sequence.status is SequenceStatus.WAITING
    assert (sequence.pending, sequence.blocks, sequence.block_table) == (20, [], ())


def test_only_the_chunk_that_ends_what_is_known_is_sampled() -> None:
    sequence = make_sequence(20)
    sequence.admit([])
    sequence.extend([4, 9])
    first = sequence.row(17)
    assert (first.tokens, first.start, first.block_table, first.draws) == (tuple(range(17)), 0, (4, 9), ())
    sequence.computed = 17
    last = sequence.row(3)
    assert (last.tokens, last.start) == ((17, 18, 19), 17)
    assert last.sampling is sequence.request.sampling
    assert last.draws == (Draw(2),)
    assert last.position(last.draws[0]) == 20


def test_a_forced_output_is_sampled_after_each_of_its_tokens_once() -> None:
    request = replace(make_request("r", list(range(20)), frequency_penalty=1.0, max_tokens=4), forced=(70, 71, 70, 72))
    sequence = Sequence(request, arrival=0)
    assert sequence.pending == 23  # after the last one nothing is looked for
    sequence.admit([])
    sequence.extend([4, 9])
    assert sequence.row(19).draws == ()
    draws = sequence.row(22).draws
    assert [draw.offset for draw in draws] == [19, 20, 21]
    assert [draw.past and draw.past.counts for draw in draws] == [{}, {70: 1}, {70: 1, 71: 1}]
    assert sequence.reusable == 19
    sequence.computed = 22
    for sampled in (5, 71, 6):  # whatever was sampled, what is recorded comes next
        sequence.take(sampled)
    assert (sequence.drawn, sequence.tokens[20:], sequence.reusable) == (3, [70, 71, 70], 22)
    last = sequence.row(1)
    assert (last.tokens, [draw.offset for draw in last.draws]) == ((70,), [0])
    assert last.draws[0].past is not None
    assert last.draws[0].past.counts == {70: 2, 71: 1}
    sequence.give_up_blocks(SequenceStatus.WAITING)  # computed again, but not sampled again
    sequence.admit([])
    assert [draw.offset for draw in sequence.row(23).draws] == [22]


def test_a_decode_row_reuses_the_block_table_until_it_grows() -> None:
    sequence = make_sequence(15)
    sequence.admit([])
    sequence.extend([3])
    sequence.computed = 15
    sequence.tokens.append(77)
    row = sequence.row(1)
    assert (row.tokens, row.start) == ((77,), 15)
    assert sequence.row(1).block_table is row.block_table
    sequence.extend([5])
    assert sequence.row(1).block_table == (3, 5)


def test_missing_blocks_count_what_the_table_does_not_hold_yet() -> None:
    sequence = make_sequence(40)
    sequence.admit([7])
    assert sequence.computed == 16
    assert [sequence.missing_blocks(count) for count in (0, 1, 16, 17, 24)] == [0, 1, 1, 2, 2]


def test_keys_chain_over_prompt_and_output() -> None:
    sequence = make_sequence(30)
    sequence.tokens += [500, 501]
    first = chain_key(root_key(b"s"), range(16))
    assert sequence.key(1) == chain_key(first, [*range(16, 30), 500, 501])
    assert sequence.key(0) == first


def test_giving_up_blocks_keeps_tokens_and_the_first_count_of_cached_ones() -> None:
    sequence = make_sequence(40)
    sequence.admit([1])
    sequence.extend([2])
    sequence.tokens.append(9)
    assert sequence.give_up_blocks(SequenceStatus.WAITING) == [1, 2]
    assert (sequence.computed, sequence.pending, sequence.block_table) == (0, 41, ())
    sequence.admit([])
    assert sequence.cached_tokens == 16
