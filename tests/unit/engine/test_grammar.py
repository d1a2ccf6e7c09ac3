"""Structured output: whatever a model would rather say, its output is of the structure, or the request was refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.core import EngineCore
from engine.grammar import MAX_CACHED, MAX_SOURCE_CHARS, GrammarState
from engine.request import FinishReason, GenerationFailed, RequestRefused, Structure, StructureKind
from tests.support.byte_tokenizer import EOS, byte_grammars
from tests.support.engine_core import Output, make_core, make_request, take
from tests.support.paged_runner import PagedRunner

LONG = 1500  # tokens


def schema(of: Any) -> Structure:
    return Structure(StructureKind.JSON_SCHEMA, json.dumps(of))


def run(core: EngineCore, structures: list[Structure | None], seed: int = 0, **more: Any) -> list[Output]:
    """Return an output for each structure, all in one batch. The runner draws as a random model would."""
    outputs = {str(index): Output() for index in range(len(structures))}
    for index, structure in enumerate(structures):
        request = make_request(str(index), [65 + index], LONG, seed=seed, structure=structure, **more)
        core.add(request, byte_grammars().compile(structure) if structure is not None else None)
    while core.has_work:
        for emission in core.step():
            assert emission.failure is None
            take(outputs[emission.request_id], emission.delta)
        assert core.check_integrity() == ()
    return list(outputs.values())


def bytes_core() -> EngineCore:
    return make_core(runner=PagedRunner(2048, 258), vocabulary_size=258, context_length=LONG + 8)


NAMES = st.text("abcxyz_", min_size=1, max_size=4)
SCALARS = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more},
              st.integers(-500, 500), st.integers(0, 900)),
    st.builds(lambda least, more: {"type": "string", "minLength": least, "maxLength": least + more},
              st.integers(0, 3), st.integers(0, 6)),
    st.sampled_from([r"^[A-Z]{2}[0-9]{2,6}$", r"^(yes|no)$"]).map(lambda p: {"type": "string", "pattern": p}),
    st.lists(st.one_of(st.text(max_size=6), st.integers(-9, 9), st.none()), min_size=1, max_size=4).map(
        lambda values: {"enum": values}),
    st.sampled_from(["date", "time", "uuid", "ipv4"]).map(lambda name: {"type": "string", "format": name}),
)  # fmt: skip


def compound(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    members = st.dictionaries(NAMES, inner, min_size=1, max_size=4)
    return st.one_of(
        st.builds(lambda items, most: {"type": "array", "items": items, "maxItems": most}, inner, st.integers(0, 3)),
        st.builds(
            lambda properties, kept: {
                "type": "object",
                "properties": properties,
                "required": sorted(properties)[:kept],
                "additionalProperties": False,
            },
            members,
            st.integers(0, 4),
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda some: {"anyOf": some}),
    )


SCHEMAS = st.recursive(SCALARS, compound, max_leaves=8)


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(of=SCHEMAS, seed=st.integers(0, 2**31))
def test_whatever_is_drawn_the_output_is_of_the_schema(of: Any, seed: int) -> None:
    (output,) = run(bytes_core(), [schema(of)], seed, temperature=1.5)
    assert output.finish_reason is FinishReason.STOP
    jsonschema.Draft202012Validator(of).validate(json.loads(output.text))


def test_an_output_without_a_bound_is_cut_off_as_any_other() -> None:
    (output,) = run(bytes_core(), [schema({"type": "array", "items": {"type": "string"}, "minItems": 900})])
    assert (output.finish_reason, len(output.tokens)) == (FinishReason.LENGTH, LONG)


@pytest.mark.parametrize(
    ("structure", "form"),
    [
        (Structure(StructureKind.REGEX, r"[0-9]{3}-(a|bc)"), r"[0-9]{3}-(a|bc)"),
        (Structure(StructureKind.CHOICE, json.dumps(["yes", "no", 'a "quoted" one', "ünï"])), None),
        (Structure(StructureKind.LARK, 'start: WORD ("," WORD)*\nWORD: /[a-z]{1,3}/'), r"[a-z]{1,3}(,[a-z]{1,3})*"),
    ],
)
@pytest.mark.parametrize("seed", range(5))
def test_other_structures_are_kept_to(structure: Structure, form: str | None, seed: int) -> None:
    (output,) = run(bytes_core(), [structure], seed)
    if output.finish_reason is FinishReason.STOP:
        assert output.text in json.loads(structure.source) if form is None else re.fullmatch(form, output.text)
    else:
        assert form is not None
        assert "*" in form


def test_structured_and_free_requests_share_a_batch_and_change_nothing_of_each_other() -> None:
    structures = [schema({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}), None,
                  Structure(StructureKind.CHOICE, '["yes", "no"]'), None]  # fmt: skip
    together = run(bytes_core(), structures)
    for index, structure in enumerate(structures):
        alone = make_core(runner=PagedRunner(2048, 258), vocabulary_size=258, context_length=LONG + 8)
        request = make_request("r", [65 + index], LONG, structure=structure)
        output = Output()
        alone.add(request, byte_grammars().compile(structure) if structure is not None else None)
        step = 0
        while alone.has_work:
            if step % 3 == 2 and alone.scheduler.running:
                alone.scheduler.preempt_youngest()
            for emission in alone.step():
                take(output, emission.delta)
            step += 1
        assert output.tokens == together[index].tokens
        assert output.stats is not None
        assert together[index].stats is not None
        assert output.stats.replay_digest == together[index].stats.replay_digest


def test_a_forced_pass_sees_the_masks_that_generating_saw() -> None:
    structure = schema({"type": "array", "items": {"enum": [1, 22, "drei"]}, "maxItems": 6, "minItems": 4})
    (recorded,) = run(bytes_core(), [structure])
    core = bytes_core()
    request = make_request("r", [65], LONG, structure=structure)
    forced = Output()
    core.add(replace(request, forced=tuple(recorded.tokens)), byte_grammars().compile(structure))
    while core.has_work:
        for emission in core.step():
            take(forced, emission.delta)
    assert forced.tokens == recorded.tokens
    assert forced.stats is not None
    assert recorded.stats is not None
    assert forced.stats.replay_digest == recorded.stats.replay_digest
    # One token that the grammar never lets come: found where it is, and nothing else breaks.
    tampered = [*recorded.tokens[:3], ord("!"), *recorded.tokens[4:]]
    core.add(replace(request, forced=tuple(tampered)), byte_grammars().compile(structure))
    found = Output()
    while core.has_work:
        for emission in core.step():
            take(found, emission.delta)
    assert found.tokens[:4] == recorded.tokens[:4]
    assert len(found.tokens) == len(tampered)


CANARY = "a-canary-in-the-schema"


@pytest.mark.parametrize(
    ("of", "named"),
    [
        ({"type": "object", "if": {"title": CANARY}}, "`if`"),
        ({"not": {"const": CANARY}}, "`not`"),
        ({"type": "array", "uniqueItems": True}, "`uniqueItems`"),
        ({"type": "object", "dependentRequired": {CANARY: ["b"]}}, "`dependentRequired`"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "`oneOf`"),
        ({"$ref": f"https://{CANARY}/x"}, "not valid"),
        ({"type": CANARY}, "not valid"),
        ({"type": "string", "format": CANARY}, "not valid"),
        ({"type": "string", "pattern": f"(?={CANARY})"}, "not valid"),
        ({"type": "string", "minLength": 3, "maxLength": 2, "title": CANARY}, "not valid"),
        # What a schema would tell the compiler, to make it look away.
        ({"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}, "`uniqueItems`"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}], "x-guidance": {"coerce_one_of": True}}, "`oneOf`"),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_keyword_and_nothing_of_it_is_repeated(of: Any, named: str) -> None:
    with pytest.raises(RequestRefused) as refused:
        byte_grammars().compile(schema(of))
    assert named in str(refused.value)
    assert CANARY not in str(refused.value)
    assert refused.value.param == "response_format"


@pytest.mark.parametrize(
    "structure",
    [
        Structure(StructureKind.REGEX, f"({CANARY}"),
        Structure(StructureKind.LARK, f"start: {CANARY}"),
        Structure(StructureKind.JSON_SCHEMA, f'["{CANARY}"'),
        Structure(StructureKind.CHOICE, "[]"),
        Structure(StructureKind.CHOICE, f'["{CANARY}", 1]'),
        Structure(StructureKind.CHOICE, json.dumps(["x"] * 1025)),
        Structure(StructureKind.REGEX, "a" * (MAX_SOURCE_CHARS + 1)),
    ],
)
def test_what_is_no_structure_or_too_much_of_one_is_refused(structure: Structure) -> None:
    with pytest.raises(RequestRefused) as refused:
        byte_grammars().compile(structure)
    assert CANARY not in str(refused.value)
    assert CANARY not in repr(structure)


def test_a_grammar_that_becomes_too_much_work_ends_its_own_request_and_no_other() -> None:
    core = bytes_core()
    # Ever more readings, and an end that is seldom drawn; with this seed not before it has become too much.
    ambiguous = Structure(
        StructureKind.LARK, 'start: (a|b|c)* "!"\na: x a x | x\nb: x b | b x | x\nc: c c c | x\nx: /[^!]/'
    )
    for name, structure in (("ambiguous", ambiguous), ("beside", None)):
        start = byte_grammars().compile(structure) if structure is not None else None
        core.add(make_request(name, [65], LONG, seed=2, structure=structure), start)
    outputs = {"ambiguous": Output(), "beside": Output()}
    failures = []
    while core.has_work:
        for emission in core.step():
            take(outputs[emission.request_id], emission.delta)
            failures += [(emission.request_id, emission.failure)] if emission.failure is not None else []
        assert core.check_integrity() == ()
    ((name, failure),) = failures
    assert name == "ambiguous"
    assert isinstance(failure, GenerationFailed)
    assert len(outputs["ambiguous"].tokens) > 20
    assert outputs["beside"].finish_reason is not None


def test_only_so_many_grammars_are_kept() -> None:
    grammars = byte_grammars()
    for number in range(MAX_CACHED + 8):
        grammars.compile(Structure(StructureKind.REGEX, f"{number}"))
    assert len(grammars._compiled) == MAX_CACHED


def test_a_token_that_may_not_come_ends_the_state_and_a_copy_goes_its_own_way() -> None:
    state = byte_grammars().compile(Structure(StructureKind.REGEX, "ab"))()
    other = state.copy()
    state.take(ord("x"))
    assert (state.failed, state.mask) == (True, None)
    assert allowed(other) == {ord("a")}
    other.take(ord("a"))
    other.take(ord("b"))
    assert allowed(other) == {EOS}


def allowed(state: GrammarState) -> set[int]:
    assert state.mask is not None
    return {token for token in range(8 * len(state.mask)) if state.mask[token // 8] >> token % 8 & 1}


@pytest.mark.parametrize("contradiction", [{"ignore_eos": True}, {"min_tokens": 3}, {"allowed_tokens": (1,)}])
def test_what_contradicts_a_structure_is_refused_by_name(contradiction: dict[str, Any]) -> None:
    structure = Structure(StructureKind.REGEX, "ab")
    with pytest.raises(RequestRefused, match=f"`{next(iter(contradiction))}`"):
        bytes_core().add(
            make_request("r", [1], structure=structure, **contradiction), byte_grammars().compile(structure)
        )
