"""Scheduler: who computes how many tokens in the next step. Knows blocks and sequences; no tensors, text or time.

Whose turn it is to begin, the waiting queue says (waiting.py): fair between keys. Who began earlier is older. Every
step serves, oldest first,
    1. each running sequence: one token if it decodes, a chunk of its prompt if it prefills;
    2. waiting sequences, admitted while sequences, budget and blocks last.
When blocks run out, the youngest running sequence is preempted: it gives up its blocks, waits for another turn, and
later recomputes prompt and output so far; tokens already emitted are fixed. The oldest therefore always advances, and
since a request that does not fit an empty pool was refused, everything finishes. Keys that have prompts to read share
the budget for them by weight.

A key does not wait for another's flood to end: where it is owed a place and none is free, the youngest sequence of the
key with the most of them is preempted, never a key's last; while a key that asks for no more than its share has a
prompt to read, those that ask for more pause, for a few steps in a row, and make up for them; and a step that serves
such gives way to who comes while it is under way. Places are not what counts there: between two waves of a flood, few
of it run.

Source: Kwon et al., SOSP 2023 (preemption by recomputation); Agrawal et al., OSDI 2024 (chunked prefill beside decode).
"""

from __future__ import annotations

from collections import abc
from collections.abc import Iterable

from engine.blocks import BlockPool, Defect, Finding
from engine.grammar import GrammarState
from engine.limits import EngineLimits, blocks_for, refuse_choiceless, refuse_impossible
from engine.metrics import SchedulerCounters
from engine.plan import BLOCK_SIZE, Reading, RowPlan, StepPlan, StepResult
from engine.request import EngineOverloaded, GenerationRequest, TokenLogprob
from engine.sequence import Sequence, SequenceStatus
from engine.waiting import WaitingQueue

MOST_GUESSES = 8  # tokens of one sequence computed on trial in a step
MOST_PAUSES = 4  # steps in a row; each is made up for by one without
LOOKED_AT_CHUNK = 128  # tokens of one sequence a step, where each is followed by a look at all it might have been
NOTHING_READ = Reading()


Tokens = abc.Sequence[TokenLogprob]


class StepMismatch(Exception):
    """We are wrong: a step's result does not answer its plan, or plan and commit did not take turns."""


class Scheduler:
    def __init__(self, limits: EngineLimits, pool: BlockPool, eos_ids: frozenset[int] = frozenset()) -> None:
        self.limits = limits
        self.pool = pool
        self._eos_ids = eos_ids
        self.counters = SchedulerCounters()
        self._running: list[Sequence] = []  # oldest first
        self._waiting = WaitingQueue(limits.max_sequences)
        self._paused = False  # who asks for more than a share, in this step
        self._pauses_left = MOST_PAUSES
        self.admitted: list[Sequence] = []  # by the latest plan
        self._planned: list[tuple[Sequence, RowPlan]] = []  # what the step under way computes
        self._filling: set[bytes] = set()  # keys of the blocks that prefills of the step under way will fill
        self._arrivals = 0
        self._known = 0  # arrivals before the plan under way
        self._dropped = False  # the latest plan
        self._preempted = False  # in this step; nobody is admitted then
        # Whose turn it was, and how many blocks were available when it was refused admission; asking again before there
        # are more would walk its prompt for nothing in every step.
        self._refused: tuple[Sequence, int] | None = None

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def sequences(self) -> Iterable[Sequence]:
        """Every sequence in flight: running, oldest first, then those that wait."""
        yield from self._running
        yield from self._waiting

    def add(self, request: GenerationRequest, grammar: GrammarState | None = None) -> Sequence:
        """Queue `request`; with a structure, `grammar` is where its output begins.

        Raises: ContextTooLong, RequestRefused, EngineOverloaded.
        """
        refuse_impossible(request, self.limits, self.pool.total)
        if self.running + self.waiting >= self.limits.in_flight:
            raise EngineOverloaded(f"{self.limits.in_flight} requests are in flight; try again later")
        if self._waiting.in_flight(request.fairness_key) >= self.limits.key_limit:
            raise EngineOverloaded(f"{self.limits.key_limit} requests of this caller are in flight; try again later")
        sequence = Sequence(request, self._arrivals, self._eos_ids, grammar)
        refuse_choiceless(request.sampling, sequence.ending, self.limits)
        sequence.allow_guesses(MOST_GUESSES if self.limits.trial_rows else 0)
        self._arrivals += 1
        self._waiting.add(sequence)
        return sequence

    def plan(self) -> StepPlan | None:
        """Return the next step, or None when nothing is in flight. `commit` or `drop_plan` must follow."""
        if self._planned:
            raise StepMismatch("a plan is already under way")
        self._preempted = False
        self.admitted = []
        self._filling.clear()
        self._known = self._arrivals
        self._make_room()
        self._paused = self._pauses_left > 0 and self._someone_reads()
        rows: list[RowPlan] = []
        self._plan_waiting(rows, self._plan_running(rows))
        if not rows and self._paused:  # who was waited for could not begin
            self._paused = False
            self._plan_waiting(rows, self._plan_running(rows))
        self._pauses_left = min(MOST_PAUSES, self._pauses_left + (-1 if self._paused else 1))
        return StepPlan(tuple(rows)) if rows else None

    def commit(self, result: StepResult) -> list[tuple[Sequence, Tokens]]:
        """Take note of a step carried out; return which sequence got which tokens, in row order, and without any, whose
        prompt was pooled.

        Each of them must then be continued (by doing nothing) or handed to `finish`.
        """
        planned, self._planned = self._planned, []
        self._dropped = False
        if len(result.sampled) != len(planned):
            raise StepMismatch(f"{len(planned)} rows were planned, {len(result.sampled)} answered")
        sampled = []
        readings = result.readings or (NOTHING_READ,) * len(planned)
        for (sequence, row), tokens, reading in zip(planned, result.sampled, readings, strict=True):
            self._waiting.charge(sequence, len(row.tokens))
            if len(row.draws) != len(tokens):
                raise StepMismatch("a row was sampled that should not be, or was not that should")
            if len(row.scores) != len(reading.scored) or (row.pool is None) != (reading.pooled is None):
                raise StepMismatch("a row was read that should not be, or was not that should")
            held = sequence.settle(tokens)
            sequence.computed += len(row.tokens) - (len(tokens) - len(held))  # what did not come true is overwritten
            sequence.read(reading)
            for token in held:
                sequence.take(token.token)
            self._publish(sequence)
            if held or sequence.pooled is not None:
                sampled.append((sequence, held))
        return sampled

    def drop_plan(self) -> None:
        """Forget the plan under way: it was not carried out. The next one is kept to the end."""
        for sequence, _ in self._planned:
            sequence.drop_guesses()
        self._planned = []
        self._dropped = True

    @property
    def gives_way(self) -> bool:
        """Whether the plan under way should be dropped: who came since asks for no more than a share, and it serves
        some who do. Never twice in a row, so that these go on as well."""
        if self._dropped or not self._waiting:
            return False
        newcomer = self._waiting.next()
        if newcomer.arrival < self._known or self._waiting.asks_above_share(newcomer):
            return False
        return any(self._waiting.asks_above_share(sequence) for sequence, _ in self._planned)

    def finish(self, sequence: Sequence) -> None:
        """Remove `sequence`, wherever it stands, for good. Its blocks become free, or cached where full."""
        if sequence.status is SequenceStatus.RUNNING:
            self._running.remove(sequence)
            self._waiting.leave(sequence)
            self.pool.release(sequence.give_up_blocks(SequenceStatus.FINISHED))
        elif sequence.status is SequenceStatus.WAITING:
            self._waiting.pop(sequence)
            self._waiting.leave(sequence)
            sequence.status = SequenceStatus.FINISHED

    def preempt_youngest(self) -> Sequence:
        """Have the youngest running sequence wait for another turn, without its blocks."""
        sequence = self._running[-1]
        self._preempt(sequence)
        self._preempted = True
        return sequence

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self.pool.release(sequence.give_up_blocks(SequenceStatus.WAITING))
        sequence.preemptions += 1
        self.counters.preemptions += 1
        self._waiting.put_back(sequence)
        self._refused = None

    def _make_room(self) -> None:
        """Take places, and blocks, for who is next and owed one from who has more than a share."""
        if not self._waiting:
            return
        newcomer = self._waiting.next()
        while self._waiting.is_owed(newcomer) and self._lacks_room(newcomer):
            above = [one for one in reversed(self._running) if self._waiting.is_above_share(one)]
            if not above:
                return
            self._preempt(max(above, key=self._waiting.excess))  # of equals the first: the youngest

    def _lacks_room(self, sequence: Sequence) -> bool:
        if self.running >= self.limits.max_sequences:
            return True
        hits = self._find_prefix(sequence)
        return not self._would_repeat(sequence, len(hits)) and not self._fits(sequence, hits)

    def _someone_reads(self) -> bool:
        """Return whether a prompt of a key that asks for no more than its share is to be read, beside others'."""
        if not any(self._waiting.asks_above_share(sequence) for sequence in self._running):
            return False
        reading = [sequence for sequence in self._running if sequence.drawn == 0]
        if self._waiting and self.running < self.limits.max_sequences:
            reading.append(self._waiting.next())
        return any(not self._waiting.asks_above_share(sequence) for sequence in reading)

    def _pauses(self, sequence: Sequence) -> bool:
        return self._paused and self._waiting.asks_above_share(sequence)

    def _plan_running(self, rows: list[RowPlan]) -> int:
        """Plan every running sequence that gets tokens; return the budget left over."""
        pausing = {sequence.arrival for sequence in self._running if self._pauses(sequence)}
        decoding = sum(1 for sequence in self._running if sequence.pending == 1 and sequence.arrival not in pausing)
        budget = self.limits.token_budget - decoding  # their tokens are set aside: a prefill never starves a decode
        allotted = self._allot(budget, pausing)
        trials = max(0, min(self.limits.trial_rows - decoding, budget))
        index = 0
        while index < len(self._running):  # preemption shortens the list, at its end, while we walk it
            sequence = self._running[index]
            if sequence.arrival in pausing:
                index += 1
                continue
            count = 1
            if sequence.pending > 1:
                key = sequence.request.fairness_key
                count = min(sequence.pending, self._chunk(sequence), budget, allotted[key])
                allotted[key] -= count
                budget -= count
            if count and not self._plan_row(sequence, count, rows, trials):
                break
            if count:
                trials -= len(rows[-1].tokens) - count
            index += 1
        return budget

    def _allot(self, budget: int, pausing: set[int]) -> dict[str, int]:
        """Return how many tokens of prompts each key may have computed in this step: what it wants, or, by weight, a
        share of what is left by those who want less. Of who waits, the next one's are set aside, unless it pauses."""
        readers = [one for one in self._running if one.pending > 1 and one.arrival not in pausing]
        if self._waiting and self.running < self.limits.max_sequences and not self._pauses(self._waiting.next()):
            readers.append(self._waiting.next())
        wanted: dict[str, int] = {}
        weights: dict[str, int] = {}
        for one in readers:
            key = one.request.fairness_key
            wanted[key] = wanted.get(key, 0) + min(one.pending, self._chunk(one))
            weights[key] = one.request.weight
        allotted = {}
        total = sum(weights.values())
        for key in sorted(wanted, key=lambda key: wanted[key] / weights[key]):
            allotted[key] = min(wanted[key], budget, max(1, budget * weights[key] // total))
            budget -= allotted[key]
            total -= weights[key]
        return allotted

    def _chunk(self, sequence: Sequence) -> int:
        """Return the most tokens of `sequence` in one step. Where the whole vocabulary is looked at after each of them
        they are fewer."""
        looked_at = sequence.request.forced or sequence.request.sampling.prompt_logprobs is not None
        return min(self.limits.chunk_tokens, LOOKED_AT_CHUNK) if looked_at else self.limits.chunk_tokens

    def _plan_row(self, sequence: Sequence, count: int, rows: list[RowPlan], trials: int = 0) -> bool:
        """Plan `count` tokens of a running sequence, and up to `trials` guesses where it decodes; return False if it
        had to be preempted itself.

        Victims are younger than `sequence` and so were not planned yet in this step.
        """
        missing = sequence.missing_blocks(count)
        if missing > 0:
            while self.pool.available < missing:
                if self.preempt_youngest() is sequence:
                    return False
            sequence.extend(self.pool.allocate(missing, sequence.request.cache_salt))
        if count > 1:
            filled = range(sequence.computed // BLOCK_SIZE, (sequence.computed + count) // BLOCK_SIZE)
            self._filling.update(sequence.key(index) for index in filled)
        if sequence.pending == 1:
            slots = len(sequence.blocks) * BLOCK_SIZE - sequence.computed - 1
            sequence.guess(min(trials, slots, self.limits.context_length - len(sequence.tokens) - 1))
        row = sequence.row(count)
        self._planned.append((sequence, row))
        rows.append(row)
        return True

    def _plan_waiting(self, rows: list[RowPlan], budget: int) -> None:
        while self._waiting and budget > 0 and self.running < self.limits.max_sequences and not self._preempted:
            sequence = self._waiting.next()
            if self._pauses(sequence) or not self._admit(sequence):
                return
            count = min(sequence.pending, self._chunk(sequence), budget)
            budget -= count
            self._plan_row(sequence, count, rows)

    def _admit(self, sequence: Sequence) -> bool:
        """Let the sequence whose turn it is run if everything it knows so far fits; return whether it does.

        A block per running sequence is left spare, for the boundaries they are about to cross: otherwise a preempted
        sequence would come back only to be preempted again.
        """
        if self._refused is not None and self._refused[0] is sequence and self.pool.available <= self._refused[1]:
            return False
        hits = self._find_prefix(sequence)
        if self._would_repeat(sequence, len(hits)):
            return False
        if not self._fits(sequence, hits):
            self._refused = (sequence, self.pool.available)
            return False
        self.pool.share(hits)
        self._waiting.pop(sequence)
        self._refused = None
        if sequence.cached_tokens is None:
            self.counters.prefix_cache_queries += sequence.prompt_length
            self.counters.prefix_cache_hits += len(hits) * BLOCK_SIZE
        sequence.admit(hits)
        self._running.append(sequence)
        self.admitted.append(sequence)
        return True

    def _fits(self, sequence: Sequence, hits: list[int]) -> bool:
        """Return whether there are blocks for all that `sequence` knows so far, `hits` among them."""
        idle = sum(1 for block in hits if self.pool.is_idle(block))
        return self.pool.available - idle >= blocks_for(len(sequence.tokens)) - len(hits) + self.running

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        """Return the cached blocks of the longest known prefix, always short of the last token: it is sampled from."""
        hits: list[int] = []
        for index in range(sequence.reusable // BLOCK_SIZE):
            block = self.pool.find(sequence.key(index))
            if block is None:
                break
            hits.append(block)
        return hits

    def _would_repeat(self, sequence: Sequence, hits: int) -> bool:
        """Return whether the next block of `sequence` is being filled in this very step by an older neighbour.

        Waiting a step turns it into a hit: of many users of one long prompt who come at once, one computes it.
        """
        return hits < sequence.reusable // BLOCK_SIZE and sequence.key(hits) in self._filling

    def _publish(self, sequence: Sequence) -> None:
        """Offer the blocks that this step filled to the prefix cache, of output as of prompt."""
        full = sequence.computed // BLOCK_SIZE
        while sequence.published < full:
            index = sequence.published
            self.pool.publish(sequence.blocks[index], sequence.key(index), sequence.request.cache_salt)
            sequence.published += 1

    def unfilled_slots(self) -> int:
        """Return how many allocated KV slots hold nothing yet; shared blocks are full and add none."""
        return sum(len(sequence.blocks) * BLOCK_SIZE - sequence.computed for sequence in self._running)

    def check_integrity(self) -> tuple[Finding, ...]:
        """Return what does not add up, in the pool and in the queues; empty means sound. Call between steps."""
        pool = self.pool.check_integrity([sequence.blocks for sequence in self._running])
        return (*pool, *self._check_queues(), *self._check_tables())

    def _check_queues(self) -> Iterable[Finding]:
        if self._waiting.running != self.running:
            yield Finding(Defect.QUEUE, None, "the keys do not run as many sequences as there are")
        for expected, queue in ((SequenceStatus.RUNNING, self._running), (SequenceStatus.WAITING, self._waiting)):
            for sequence in queue:
                if sequence.status is not expected:
                    message = f"sequence {sequence.arrival} is {sequence.status} among the {expected}"
                    yield Finding(Defect.QUEUE, sequence.arrival, message)

    def _check_tables(self) -> Iterable[Finding]:
        for sequence in self.sequences:
            held = sequence.blocks
            if len(set(held)) != len(held) or tuple(held) != sequence.block_table:
                yield Finding(
                    Defect.TABLE, sequence.arrival, f"sequence {sequence.arrival} has an ambiguous block table"
                )
            if len(held) < blocks_for(sequence.computed) or (held and sequence.status is SequenceStatus.WAITING):
                message = f"sequence {sequence.arrival} holds {len(held)} blocks for {sequence.computed} tokens"
                yield Finding(Defect.TABLE, sequence.arrival, message)
