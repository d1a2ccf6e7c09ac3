"""Laws of the block pool and of the engine that schedules on it, under any order of events.

free + cached + used == total, and check_integrity() is clean, after every step and every abort
a block of one salt, or of one adapter, never reaches another
whatever was shared, evicted, preempted or aborted, every token is the one the request gets when alone
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.blocks import BlockPool
from engine.core import EngineCore
from engine.plan import BLOCK_SIZE, Draw, RowPlan
from engine.request import EngineOverloaded, GenerationRequest, Pooling, RequestRefused, TokenDelta, TokenLogprob
from engine.sequence import Sequence, SequenceStatus
from tests.support.engine_core import Output, make_core, make_request, run_all, take
from tests.support.paged_runner import PagedRunner

OWNERS = (b"a", b"b", b"c")


class PoolMachine(RuleBasedStateMachine):
    """The pool against a naive one: what each block holds, who holds it, and in which order it was let go."""

    @initialize(total=st.integers(1, 12))
    def start(self, total: int) -> None:
        self.pool = BlockPool(total)
        self.tables: list[list[int]] = []
        self.contents: dict[int, bytes] = {}  # block → key it was published under, as long as it may be found
        self.idle: list[int] = []  # published blocks nobody holds, oldest first
        self.owners: dict[int, bytes] = {}  # of `contents`
        self.keys = 0

    def held(self, block: int) -> int:
        return sum(table.count(block) for table in self.tables)

    def oldest_for(self, owner: bytes) -> int:
        own = [block for block in self.idle if self.owners[block] == owner]
        share = len(self.idle) / len({self.owners[block] for block in self.idle})
        return own[0] if len(own) > share else self.idle[0]

    @rule(data=st.data(), owner=st.sampled_from(OWNERS))
    def allocate(self, data: st.DataObject, owner: bytes) -> None:
        count = data.draw(st.integers(0, self.pool.available))
        free = self.pool.free
        idle = list(self.idle)
        blocks = self.pool.allocate(count, owner)
        evicted = [block for block in blocks if block in idle]
        assert len(evicted) == max(0, count - free)
        for block in evicted:
            assert block == self.oldest_for(owner)
            self.idle.remove(block)
            assert self.pool.find(self.contents.pop(block)) is None
        assert all(self.held(block) == 0 for block in blocks)
        self.tables.append(blocks)

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data(), known=st.booleans())
    def publish(self, data: st.DataObject, known: bool) -> None:
        block = data.draw(st.sampled_from(sorted({block for table in self.tables for block in table})))
        self.keys += 1
        key = str(self.keys).encode()
        if known and self.contents:  # another sequence computed the same
            key = data.draw(st.sampled_from(sorted(self.contents.values())))
        owner = OWNERS[self.keys % len(OWNERS)]
        self.pool.publish(block, key, owner)
        if block not in self.contents and key not in self.contents.values():
            self.contents[block] = key
            self.owners[block] = owner

    @rule(owner=st.sampled_from(OWNERS))
    def forget(self, owner: bytes) -> None:
        gone = [block for block in self.contents if self.owners[block] == owner]
        assert self.pool.forget(owner) == len(gone)
        for block in gone:
            assert self.pool.find(self.contents.pop(block)) is None
        self.idle = [block for block in self.idle if block not in gone]

    @precondition(lambda self: self.contents)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        keys = data.draw(st.lists(st.sampled_from(sorted(self.contents.values())), unique=True))
        blocks = [block for block in map(self.pool.find, keys) if block is not None]
        assert [self.contents[block] for block in blocks] == keys
        self.pool.share(blocks)
        self.idle = [block for block in self.idle if block not in blocks]
        self.tables.append(blocks)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.release(table)
        self.idle += [block for block in reversed(table) if self.held(block) == 0 and block in self.contents]

    @invariant()
    def adds_up(self) -> None:
        if not hasattr(self, "pool"):
            return
        assert self.pool.free + self.pool.cached + self.pool.used == self.pool.total
        assert self.pool.check_integrity(self.tables) == ()
        assert self.pool.cached == len(self.idle)
        assert all(self.pool.find(key) == block for block, key in self.contents.items())


SALTS = [b"tenant-a", b"tenant-b", b"tenant-b\x00"]
ADAPTERS = ("x", "y")
BLOCKS = 12
LIMITS = {"context_length": 150, "max_sequences": 5, "token_budget": 40, "waiting_limit": 4}


def prompt_of(stem: int, length: int) -> list[int]:
    """Few stems and any length: many requests share a prefix, within a salt and an adapter and across them."""
    return [stem * 1000 + index for index in range(length)]


class GuessableRunner(PagedRunner):
    """Often says the next of five tokens, whatever it computed: what came before tells what comes."""

    def _sample(self, row: RowPlan, draw: Draw) -> TokenLogprob:
        sampled = super()._sample(row, draw)
        cycle = row.position(draw) % 5 if sampled.token % 4 else sampled.token
        return replace(sampled, token=cycle)


@lru_cache(maxsize=4096)
def tokens_alone(stem: int, length: int, seed: int, adapter: str | None) -> tuple[int, ...]:
    core = make_core(runner=GuessableRunner(64), adapters=ADAPTERS, **(LIMITS | {"token_budget": 4096}))
    request = replace(make_request("alone", prompt_of(stem, length), 60, seed=seed), adapter=adapter)
    return tuple(run_all(core, [request], check=False)["alone"].tokens)


@lru_cache(maxsize=4096)
def read_alone(
    stem: int, length: int, read: Pooling | int | None, adapter: str | None
) -> tuple[bytes | None, list[TokenLogprob]]:
    """Return the vector of a prompt, or the log-probabilities of its tokens."""
    core = make_core(64, adapters=ADAPTERS, **(LIMITS | {"token_budget": 4096}))
    wanted = None if isinstance(read, Pooling) else read
    request = replace(make_request("alone", prompt_of(stem, length), 1, prompt_logprobs=wanted), adapter=adapter)
    if isinstance(read, Pooling):
        request = replace(request, pooling=read)
    output = run_all(core, [request], check=False)["alone"]
    return output.embedding, output.prompt_logprobs


def root_of(sequence: Sequence) -> tuple[bytes, str | None]:
    return sequence.request.cache_salt, sequence.request.adapter


@dataclass(frozen=True)
class Asked:
    stem: int
    length: int
    max_tokens: int
    salt: bytes
    seed: int
    forced: bool
    key: str
    read: Pooling | int | None
    priority: int
    adapter: str | None


ASKED = st.builds(
    Asked,
    stem=st.integers(0, 1),
    length=st.sampled_from([1, 15, 16, 17, 33, 48, 49, 100]),
    max_tokens=st.sampled_from([1, 2, 16, 40, 60]),
    salt=st.sampled_from(SALTS),
    seed=st.integers(0, 1),
    forced=st.sampled_from([False, False, True]),
    key=st.sampled_from("abc"),
    read=st.sampled_from([None, None, None, 2, *Pooling]),
    priority=st.sampled_from([0, 0, -1]),
    adapter=st.sampled_from([None, None, *ADAPTERS]),
)


class EngineMachine(RuleBasedStateMachine):
    @initialize(chunk=st.sampled_from([7, 16, 40]), trials=st.sampled_from([0, 4, 24]))
    def start(self, chunk: int, trials: int) -> None:
        runner = GuessableRunner(BLOCKS)
        self.core: EngineCore = make_core(
            runner=runner, adapters=ADAPTERS, chunk_tokens=chunk, trial_rows=trials, **LIMITS
        )
        self.outputs: dict[str, Output] = {}
        self.expected: dict[str, tuple[int, ...]] = {}
        self.readings: dict[str, tuple[bytes | None, list[TokenLogprob]]] = {}
        self.requests: dict[str, GenerationRequest] = {}
        self.computed: set[tuple[bytes, str | None, tuple[int, ...]]] = set()  # every full block ever filled
        self.added = 0

    @rule(request=ASKED)
    def add(self, request: Asked) -> None:
        self.ask(request)

    def ask(self, asked: Asked) -> None:
        stem, length, max_tokens, seed, adapter = asked.stem, asked.length, asked.max_tokens, asked.seed, asked.adapter
        forced, read, key = asked.forced, asked.read, asked.key
        request = make_request(str(self.added), prompt_of(stem, length), max_tokens, salt=asked.salt, seed=seed)
        weight = 1 + "abc".index(key)
        request = replace(request, fairness_key=key, priority=asked.priority, weight=weight, adapter=adapter)
        if isinstance(read, Pooling):
            request, forced = replace(request, pooling=read), False
        elif read is not None:
            request = replace(request, sampling=replace(request.sampling, prompt_logprobs=read))
        if forced:
            request = replace(request, forced=tokens_alone(stem, length, seed, adapter)[:max_tokens])
        try:
            self.core.add(request)
        except EngineOverloaded:
            assert len(self.outputs) == LIMITS["max_sequences"] + LIMITS["waiting_limit"]
            return
        self.added += 1
        self.outputs[request.request_id] = Output()
        self.requests[request.request_id] = request
        generated = () if request.pooling is not None else tokens_alone(stem, length, seed, adapter)[:max_tokens]
        self.expected[request.request_id] = generated
        self.readings[request.request_id] = read_alone(stem, length, read, adapter)

    @rule(length=st.sampled_from([0, 150, 151]), max_tokens=st.sampled_from([0, 1]))
    def add_the_impossible(self, length: int, max_tokens: int) -> None:
        try:
            self.core.add(make_request("impossible", prompt_of(0, length), max_tokens))
        except RequestRefused:
            return
        raise AssertionError("an impossible request was taken")

    @rule(count=st.integers(1, 12))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.step_once()

    @precondition(lambda self: self.outputs)
    @rule(request=ASKED)
    def step_while_another_comes(self, request: Asked) -> None:
        coming = iter([request])
        self.step_once(lambda: next((self.ask(one) for one in coming), None))
        self.step_once()

    def step_once(self, poll: Callable[[], None] = lambda: None) -> None:
        watched = list(self.core.scheduler.sequences)
        emissions = self.core.step(poll)
        for sequence in self.core.scheduler.admitted:
            self.check_hits(sequence)
        for sequence in watched:
            self.note_computed(sequence)
        for emission in emissions:
            self.receive(emission.request_id, emission.delta)
        self.adds_up()

    def check_hits(self, sequence: Sequence) -> None:
        """What a sequence found was computed before under its own salt and adapter, and never reaches its last prompt
        token."""
        found = sequence.cached_tokens or 0
        assert found % BLOCK_SIZE == 0
        assert found < sequence.prompt_length
        if found:
            assert (*root_of(sequence), tuple(sequence.tokens[:found])) in self.computed

    def note_computed(self, sequence: Sequence) -> None:
        computed = sequence.computed
        if sequence.status is SequenceStatus.FINISHED:  # all was computed but a last token that was sampled
            computed = len(sequence.tokens) - (0 if sequence.request.forced or sequence.request.pooling else 1)
        for end in range(BLOCK_SIZE, computed + 1, BLOCK_SIZE):
            self.computed.add((*root_of(sequence), tuple(sequence.tokens[:end])))

    def receive(self, request_id: str, delta: TokenDelta) -> None:
        output = self.outputs[request_id]
        take(output, delta)
        assert tuple(output.tokens) == self.expected[request_id][: len(output.tokens)]
        if delta.finish_reason is not None:
            assert tuple(output.tokens) == self.expected[request_id]
            assert (output.embedding, output.prompt_logprobs) == self.readings[request_id]
            del self.outputs[request_id]

    @precondition(lambda self: self.outputs)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.outputs)))
        emission = self.core.abort(request_id)
        assert emission is not None
        assert emission.delta.stats is not None
        assert emission.delta.stats.output_tokens == len(self.outputs.pop(request_id).tokens)
        self.adds_up()

    @rule()
    def preempt(self) -> None:
        assume(self.core.scheduler.running > 0)
        self.core.scheduler.preempt_youngest()

    @invariant()
    def adds_up(self) -> None:
        if not hasattr(self, "core"):
            return
        pool = self.core.scheduler.pool
        assert pool.free + pool.cached + pool.used == pool.total
        assert self.core.check_integrity() == ()

    @invariant()
    def no_block_is_held_under_two_salts_or_adapters(self) -> None:
        if not hasattr(self, "core"):
            return
        roots: dict[int, tuple[bytes, str | None]] = {}
        for sequence in self.core.scheduler.sequences:
            for block in sequence.blocks:
                assert roots.setdefault(block, root_of(sequence)) == root_of(sequence)

    def teardown(self) -> None:
        """Whatever happened, everything left finishes, with the right tokens, and gives every block back."""
        if not hasattr(self, "core"):
            return
        for _ in range(3000):
            if not self.core.has_work:
                break
            self.step_once()
        assert not self.core.has_work
        assert self.outputs == {}
        assert self.core.scheduler.pool.used == 0
        assert self.core.scheduler._waiting._keys == {}


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=40)
TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(max_examples=120, stateful_step_count=40)


# What once ended the step thread: a preemption on the way brought a key down to its share, in the middle of a plan.
FALLS_TO_ITS_SHARE = (
    *[("add", "a", 1, 1)] * 5, ("add", "a", 48, 1), ("step", 11), ("add", "a", 15, 1), ("come", "a", 1, 60),
    ("preempt", 2), ("abort", "6"), ("abort", "7"), ("add", "a", 1, 1), ("add", "a", 1, 1), ("come", "c", 1, 40),
    ("preempt", 3), ("step", 12), ("come", "a", 48, 1), ("preempt", 2), ("other", "a", 100, 1), ("come", "c", 100, 1),
    ("preempt", 1), ("add", "b", 1, 40), ("step", 1), ("preempt", 3), ("read", "b", 15, 1), ("add", "a", 48, 1),
    ("add", "a", 33, 2), ("add", "b", 100, 1),
)  # fmt: skip


def test_a_key_that_falls_to_its_share_while_a_step_is_planned_waits_for_the_next() -> None:
    machine = EngineMachine()
    machine.start(chunk=7, trials=0)
    for what, *told in FALLS_TO_ITS_SHARE:
        if what == "step":
            machine.step(count=told[0])
        elif what == "abort":
            assert machine.core.abort(str(told[0])) is not None
            del machine.outputs[str(told[0])]
        elif what == "preempt":
            for _ in range(int(told[0])):
                machine.core.scheduler.preempt_youngest()
        else:
            key, length, max_tokens = told
            salt, read = (b"tenant-b" if what == "other" else b"tenant-a"), (2 if what == "read" else None)
            asked = Asked(0, int(length), int(max_tokens), salt, 0, False, str(key), read, 0, None)
            (machine.step_while_another_comes if what == "come" else machine.add)(request=asked)
        machine.adds_up()
    machine.teardown()
