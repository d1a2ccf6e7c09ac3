"""Position-wise invariance with a real model: the bits of a token depend on what stands before it and on nothing else.

`wide` has products for which the library itself is not invariant on some machines, so that what replaces it is tested
where that is so.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from engine.core import EngineCore
from engine.grammar import Grammars
from engine.reading import Reading
from engine.request import GenerationRequest, Pooling, Structure, StructureKind
from engine.tokenizer import Tokenizer
from tests.support.byte_tokenizer import EOS
from tests.support.engine_core import Output, make_request, run_all, take
from tests.support.invariance import bits, others, prompt, sampled
from tests.support.model_engine import MOST_ROWS, LoadedModel, load_model, model_core
from tests.support.tiny_models import VOCABULARY

LENGTHS = (1, 15, 16, 17, 63, 65, 257, 300, 509)  # the last grows over the end of a segment of keys
NEW_TOKENS = 12
UNBOUNDED = MOST_ROWS
MODELS = ("llama", "qwen2", "qwen3", "wide")  # mistral differs from llama by no operation
PLAIN = ("plain llama", "plain qwen3")  # by torch alone, where others go by what numba compiles


@pytest.fixture(params=MODELS + PLAIN)
def model(request: pytest.FixtureRequest, tiny_models: dict[str, Path]) -> LoadedModel:
    name = request.param.removeprefix("plain ")
    return load_model(tiny_models[name], compiled=name == request.param)


def ask(length: int, name: str = "") -> GenerationRequest:
    return sampled(length, NEW_TOKENS, name)


@cache
def alone(model: LoadedModel, length: int) -> tuple[object, ...]:
    return bits(run_all(model_core(model), [ask(length, "r")])["r"])


def assert_as_alone(model: LoadedModel, outputs: dict[str, Output]) -> None:
    for length in LENGTHS:
        assert bits(outputs[str(length)]) == alone(model, length)


@pytest.mark.parametrize("chunk", [16, 64, 100, UNBOUNDED])
def test_chunk_boundaries_change_no_bit(model: LoadedModel, chunk: int) -> None:
    for length in LENGTHS:
        core = model_core(model, chunk_tokens=chunk)
        assert bits(run_all(core, [ask(length)])[str(length)]) == alone(model, length)


@pytest.mark.parametrize("count", [1, 7, 32, 40])
def test_neighbours_change_no_bit(model: LoadedModel, count: int) -> None:
    beside = others(count)
    core = model_core(model, 1024, token_budget=64 + 17 * count, chunk_tokens=100)
    mine = [ask(length) for length in LENGTHS]
    assert_as_alone(model, run_all(core, [*beside[: count // 2], *mine, *beside[count // 2 :]], check=False))


def test_a_cache_warm_to_any_block_boundary_changes_no_bit(model: LoadedModel) -> None:
    for warm in range(16, 257, 16):
        core = model_core(model, chunk_tokens=100)
        run_all(core, [make_request("warm", prompt(warm + 1), 1)])
        output = run_all(core, [ask(257)])["257"]
        assert output.stats is not None
        assert output.stats.cached_tokens == warm
        assert bits(output) == alone(model, 257)


@pytest.mark.parametrize("every", [1, 2, 3, 5])
def test_preemption_at_every_kth_step_changes_no_bit(model: LoadedModel, every: int) -> None:
    def preempt(core: EngineCore, step: int) -> None:
        if step % every == every - 1 and core.scheduler.running:
            core.scheduler.preempt_youngest()

    for length in (1, 17, 65, 257):
        core = model_core(model, chunk_tokens=100)
        output = run_all(core, [ask(length)], before_step=preempt)[str(length)]
        assert output.stats is not None
        assert output.stats.preemptions > 0
        assert bits(output) == alone(model, length)


@pytest.mark.parametrize("chunk", [16, 64, 100, UNBOUNDED])
def test_going_through_a_recorded_output_gives_the_bits_of_generating_it(model: LoadedModel, chunk: int) -> None:
    def preempt(core: EngineCore, step: int) -> None:
        if step % 3 == 2 and chunk == 16 and core.scheduler.running:
            core.scheduler.preempt_youngest()

    core = model_core(model, 1024, chunk_tokens=chunk, token_budget=200)
    recorded = {length: alone(model, length)[0] for length in LENGTHS}
    again = [
        replace(ask(length), forced=tuple(tokens), cache_salt=b"%d" % length) for length, tokens in recorded.items()
    ]
    beside = others(7)
    outputs = run_all(core, [*beside[:3], *again, *beside[3:]], before_step=preempt, check=False)
    assert_as_alone(model, outputs)


def plain(length: int, name: str, **sampling: object) -> GenerationRequest:
    """What may be guessed: nothing looks back. With two tokens to choose from, the model repeats itself."""
    few = {"ignore_eos": True, "top_logprobs": 5, "allowed_tokens": (7, 40)}
    return make_request(name, prompt(length), 60, seed=length, **few, **sampling)


@pytest.mark.parametrize("trials", [4, 24, 200])
def test_guesses_change_no_bit_and_save_steps(model: LoadedModel, trials: int) -> None:
    requests = [plain(length, f"greedy-{length}", temperature=0.0) for length in LENGTHS]
    requests += [plain(length, f"drawn-{length}", temperature=0.3, stop=("qq",)) for length in LENGTHS]
    steps = {}
    outputs = {}
    for rows in (0, trials):
        core = model_core(model, 1024, trial_rows=rows, token_budget=400)
        outputs[rows] = {name: bits(output) for name, output in run_all(core, requests).items()}
        steps[rows] = core.metrics().steps
    assert outputs[0] == outputs[trials]
    assert steps[trials] < steps[0] or trials < len(requests)  # each row may guess


GATES = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 64, 129, 256, 257, 320)


@pytest.mark.parametrize("rows", GATES)
def test_a_step_of_any_number_of_rows_changes_no_bit(tiny_models: dict[str, Path], rows: int) -> None:
    """As many sequences as rows decode at once: mine among others that are structured, forced, forks of one prompt, or
    guess; and prefills come and go beside them."""
    directory = tiny_models["wide"]
    core = model_core(
        load_model(directory),
        2048,
        max_sequences=rows,
        token_budget=max(rows, 160),
        trial_rows=rows + 8,
        chunk_tokens=48,
    )
    mine = [ask(length) for length in LENGTHS[: max(1, min(rows, len(LENGTHS)))]]
    structured = [ordered(n, f"structured-{n}") for n in range(1 + rows // 16)]
    forced = [
        replace(ask(17, f"forced-{n}"), forced=tuple(alone(load_model(directory), 17)[0])) for n in range(rows // 16)
    ]
    forks = [replace(ask(63, f"fork-{n}"), sampling=replace(ask(63).sampling, seed=n)) for n in range(rows // 8)]
    guessed = [plain(15 + n, f"guess-{n}", temperature=0.0) for n in range(rows // 16)]
    free = others(max(0, rows - len(forced) - len(forks) - len(guessed)))
    asked = [*free[::2], *mine, *structured, *forced, *forks, *guessed, *free[1::2]]
    outputs = run_all(core, asked, grammars=grammars_of(directory), check=False)
    assert core.check_integrity() == ()
    for request in mine:
        assert bits(outputs[request.request_id]) == alone(load_model(directory), len(request.prompt))
    for n in range(len(forced)):
        assert bits(outputs[f"forced-{n}"]) == alone(load_model(directory), 17)
    for request in structured[:4]:
        assert bits(outputs[request.request_id]) == ordered_alone(directory, int(request.request_id.split("-")[1]))
    for n, request in enumerate(forks[:4]):
        assert bits(outputs[f"fork-{n}"]) == bits(run_all(model_core(load_model(directory)), [request])[f"fork-{n}"])


def test_going_through_every_one_of_a_full_step_s_outputs_gives_its_bits(tiny_models: dict[str, Path]) -> None:
    directory = tiny_models["wide"]
    asked = [*(ask(length) for length in LENGTHS), *(ordered(n, f"structured-{n}") for n in range(6)), *others(50)]
    outputs = run_all(full_core(directory), asked, grammars=grammars_of(directory), check=False)
    again = [replace(request, forced=tuple(outputs[request.request_id].tokens)) for request in asked]
    repeated = run_all(full_core(directory), [*again, *renamed(again)], grammars=grammars_of(directory), check=False)
    for request in asked:
        assert bits(repeated[request.request_id]) == bits(outputs[request.request_id])
        assert bits(repeated[f"{request.request_id}-again"]) == bits(outputs[request.request_id])


def full_core(directory: Path) -> EngineCore:
    return model_core(load_model(directory), 4096, max_sequences=160, token_budget=400, chunk_tokens=100)


def renamed(requests: list[GenerationRequest]) -> list[GenerationRequest]:
    return [replace(request, request_id=f"{request.request_id}-again") for request in requests]


@cache
def grammars_of(directory: Path) -> Grammars:
    return Grammars.of(Tokenizer(Reading(directory)).json, VOCABULARY, frozenset({EOS}))


STRUCTURES = (
    Structure(StructureKind.REGEX, "(ja|nein|[0-9]{3,9}) bis [a-f]{2,5}"),
    Structure(StructureKind.JSON_SCHEMA, '{"type": "object", "properties": {"fee": {"type": "integer"}}}'),
)


def ordered(n: int, name: str) -> GenerationRequest:
    """What may be said is ordered: one structure or the other."""
    structure = STRUCTURES[n % len(STRUCTURES)]
    return make_request(name, prompt(20 + 11 * n), 40, seed=n, temperature=1.2, top_p=0.9, structure=structure)


@cache
def ordered_alone(directory: Path, n: int) -> tuple[object, ...]:
    core = model_core(load_model(directory))
    return bits(run_all(core, [ordered(n, "r")], grammars=grammars_of(directory))["r"])


def test_choices_of_one_prompt_share_its_blocks(model: LoadedModel) -> None:
    core = model_core(model, 64)
    choices = [replace(ask(100, f"choice-{n}"), sampling=replace(ask(100).sampling, seed=n)) for n in range(8)]
    held: list[int] = []
    run_all(core, choices, before_step=lambda core, step: held.append(core.metrics().used_blocks))
    assert max(held) <= 6 + 8  # six full blocks of the prompt, and of each choice the rest with its answer


def read(length: int, name: str, pooling: Pooling | None) -> GenerationRequest:
    """Asked for the vector of a prompt, or for the log-probabilities of its tokens."""
    request = make_request(name, prompt(length), 1, seed=length, prompt_logprobs=None if pooling else 5)
    return replace(request, pooling=pooling)


@cache
def read_alone(model: LoadedModel, length: int, pooling: Pooling | None) -> tuple[object, ...]:
    return shown(run_all(model_core(model), [read(length, "r", pooling)])["r"])


def shown(output: Output) -> tuple[object, ...]:
    assert output.stats is not None
    return output.embedding, output.prompt_logprobs, output.stats.replay_digest


@pytest.mark.parametrize("pooling", [Pooling.MEAN, Pooling.LAST, None])
@pytest.mark.parametrize("chunk", [16, 100, UNBOUNDED])
def test_what_is_read_of_a_prompt_depends_on_nothing_else(
    model: LoadedModel, pooling: Pooling | None, chunk: int
) -> None:
    def preempt(core: EngineCore, step: int) -> None:
        if step % 3 == 2 and chunk == 16 and core.scheduler.running > 1:  # what is read from the start would start anew
            core.scheduler.preempt_youngest()

    core = model_core(model, 1024, chunk_tokens=chunk, token_budget=200)
    run_all(core, [ask(length) for length in LENGTHS])  # and its blocks are cached
    beside = others(7)
    reads = [read(length, f"read-{length}", pooling) for length in LENGTHS]
    outputs = run_all(core, [*beside[:3], *reads, *beside[3:]], before_step=preempt)
    for length in LENGTHS:
        output = outputs[f"read-{length}"]
        assert shown(output) == read_alone(model, length, pooling)
        assert [one.token for one in output.prompt_logprobs] == ([] if pooling else prompt(length)[1:])
        assert (output.embedding is None) == (pooling is None)


@pytest.mark.parametrize("layer", [1, 2, 3, 4])
def test_steps_given_up_between_layers_for_who_came_change_no_bit(model: LoadedModel, layer: int) -> None:
    """One key floods; others ask, at every third step or so, when it has come to a quarter of the first layer."""
    core = model_core(model, 1024, max_sequences=8, token_budget=200, chunk_tokens=64)
    layers = 4 * model.config.num_hidden_layers  # quarters: a step may be given up within, too
    outputs = {request.request_id: Output() for request in others(40)}
    for request in others(40):
        core.add(replace(request, fairness_key="flood"))
    coming = [replace(ask(length), fairness_key=f"quiet-{length}") for length in LENGTHS]
    outputs |= {request.request_id: Output() for request in coming}
    moments = itertools.cycle([False] * (2 * layers + layer - 1) + [True] + [False] * (layers - layer))

    def poll() -> None:
        if next(moments) and coming:
            core.add(coming.pop())

    while core.has_work or coming:
        for emission in core.step(poll):
            take(outputs[emission.request_id], emission.delta)
        assert core.check_integrity() == ()
    assert core.metrics().interrupted_steps >= 5
    assert_as_alone(model, outputs)


def test_preemption_with_an_evicted_cache_changes_no_bit(model: LoadedModel) -> None:
    def preempt(core: EngineCore, step: int) -> None:
        while step % 5 == 4 and core.scheduler.running:
            core.scheduler.preempt_youngest()

    core = model_core(model, 36, token_budget=64, chunk_tokens=64)
    outputs = run_all(core, [*others(12), *(ask(length) for length in LENGTHS)], before_step=preempt)
    assert core.metrics().preemptions > 0
    assert_as_alone(model, outputs)


def test_another_process_of_blocks_and_requests_before_changes_no_bit(model: LoadedModel) -> None:
    core = model_core(model, 64)
    run_all(core, others(20))
    assert_as_alone(model, run_all(core, [ask(length) for length in LENGTHS]))
