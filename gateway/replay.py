"""Replay of a recorded request, made again from its leaves and its content alone.

Every choice goes through engine/replay.py with the tokens of the prompt that the model saw, the sampling that the
leaf states, and the stop strings and token ids of the body as sent. Nothing of the replay reaches a client, and no
policy is asked: what was allowed then is compared, not decided anew.

ReplayRefused    the only error of ours: this request cannot be replayed here; the message says why
(the engine's own errors, engine/request.py, pass through)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import orjson
from pydantic import ValidationError

from audit.leaf import Leaf
from audit.reader import RevealedContent
from audit.records import Json, RecordType
from engine.replay import ReplayOutcome, embed_again, force, regenerate
from engine.request import Engine, GenerationRequest, SamplingParams
from gateway.message import structure_of
from gateway.schemas.bodies import InferenceRequest, read_body
from gateway.schemas.embeddings import EmbeddingsRequest
from gateway.schemas.inference import ChatRequest
from gateway.strict_json import MalformedJson

Mode = Literal["regenerate", "forced"]


class ReplayRefused(Exception):
    """The request cannot be replayed here."""


@dataclass(frozen=True, slots=True)
class ChoiceReplay:
    index: int
    outcome: str  # identical | consistent | different
    first_difference: int | None  # output position, 0 the first
    tokens: int  # replayed


@dataclass(frozen=True, slots=True)
class Replay:
    request_id: str
    mode: str  # regenerate | forced
    outcome: str  # the weakest of its choices: different < consistent < identical
    first_difference: int | None  # of the first choice that differs
    model: str  # version digest
    recorded_engine: str  # digest of the numeric policy then …
    engine: str  # … and now
    choices: tuple[ChoiceReplay, ...]

    def recorded(self) -> dict[str, Json]:
        """Return what the log keeps of it."""
        return {
            "mode": self.mode,
            "outcome": self.outcome,
            "model": self.model,
            "recorded_engine": self.recorded_engine,
            "engine": self.engine,
            "choices": [asdict(choice) for choice in self.choices],
        }


@dataclass(frozen=True, slots=True)
class Recording:
    """What a replay needs of the evidence."""

    request_id: str
    version: str  # of the model that answered
    engine: str  # numeric policy
    prompts_to_model: tuple[str, ...]  # one; of embeddings, each input
    sampling: SamplingParams  # of choice 0, without the structure: that depends on the model too
    asked: InferenceRequest
    choices: tuple[Mapping[str, Any], ...]  # ChoiceEntry members as recorded
    tokens: tuple[tuple[int, ...], ...]  # as generated, one member a choice


def recording(leaves: Sequence[Leaf], content: RevealedContent) -> Recording:
    """Return the recording of a request. Raises: ReplayRefused."""
    received = next((leaf for leaf in leaves if leaf.type is RecordType.REQUEST_RECEIVED), None)
    completed = next((leaf for leaf in leaves if leaf.type is RecordType.REQUEST_COMPLETED), None)
    if received is None:
        raise ReplayRefused("the request was denied: there is no answer to replay")
    if completed is None or content.output_tokens is None:
        raise ReplayRefused("the request has no completed answer: only what was generated to an end is replayed")
    if content.prompt is None or content.prompt_to_model is None:
        raise ReplayRefused("the content of the request is not there")
    body: Any = received.body
    asked = _asked(body["action"], content.prompt)
    shown = content.prompt_to_model.decode()
    return Recording(
        request_id=str(received.request),
        version=body["model"]["version"],
        engine=body["model"]["engine"],
        prompts_to_model=tuple(orjson.loads(shown)) if isinstance(asked, EmbeddingsRequest) else (shown,),
        sampling=_sampling(body["sampling"], asked),
        asked=asked,
        choices=tuple(completed.body["choices"]),  # type: ignore[arg-type]
        tokens=tuple(tuple(tokens) for tokens in orjson.loads(content.output_tokens)),
    )


async def replay(engine: Engine, recorded: Recording, replay_id: str, mode: Mode = "regenerate") -> Replay:
    """Have every choice come out again and compare. `replay_id` is new; it names the replay to the engine.

    Raises:
        ReplayRefused: the model version is not loaded, or a choice has no digest.
        EngineError: the engine's own refusals.
    """
    if recorded.version not in engine.versions:
        raise ReplayRefused(
            f"the answer came from model version `{recorded.version}`, which is not loaded; start a gateway with it"
        )
    again = _replay_vector if isinstance(recorded.asked, EmbeddingsRequest) else _replay_choice
    choices = [
        await again(engine, recorded, position, f"{replay_id}/{position}", mode)
        for position in range(len(recorded.choices))
    ]
    return _verdict(engine, recorded, choices, mode)


async def _replay_vector(
    engine: Engine, recorded: Recording, position: int, replay_id: str, mode: Mode
) -> ChoiceReplay:
    """A vector has no positions, and one pass is all that either mode could do."""
    assert isinstance(recorded.asked, EmbeddingsRequest)
    if engine.numeric_policy != recorded.engine:
        raise ReplayRefused(
            f"the vectors were made under numeric policy `{recorded.engine}`, and `{engine.numeric_policy}` holds "
            "here: of vectors only bits could be compared"
        )
    entry = recorded.choices[position]
    request = GenerationRequest(
        request_id=replay_id,
        prompt=tuple(engine.encode(recorded.prompts_to_model[position], chat=False)),
        sampling=recorded.sampling,
        cache_salt=b"",
        fairness_key="replay",
        pooling=recorded.asked.pooling,
        adapter=_adapter(engine, recorded),
    )
    verdict = await embed_again(engine, request, entry["replay"])
    return ChoiceReplay(entry["index"], verdict.outcome.value, verdict.first_difference, verdict.output_tokens)


async def _replay_choice(
    engine: Engine, recorded: Recording, position: int, replay_id: str, mode: Mode
) -> ChoiceReplay:
    assert not isinstance(recorded.asked, EmbeddingsRequest)
    entry, tokens = recorded.choices[position], recorded.tokens[position]
    if not entry["replay"] and tokens:
        raise ReplayRefused("a choice was cut off without a digest: there is nothing to compare its bits with")
    (prompt,) = recorded.prompts_to_model
    structure = structure_of(recorded.asked, engine.dialect, prompt)
    request = GenerationRequest(
        request_id=replay_id,
        prompt=tuple(engine.encode(prompt, chat=isinstance(recorded.asked, ChatRequest))),
        sampling=replace(recorded.sampling, structure=structure, seed=int(entry["seed"])),
        cache_salt=b"",  # engine/replay.py gives it one that nobody shares
        fairness_key="replay",
        adapter=_adapter(engine, recorded),
    )
    again = force if mode == "forced" else regenerate
    verdict = await again(engine, request, entry["replay"], recorded_policy=recorded.engine, recorded_tokens=tokens)
    return ChoiceReplay(entry["index"], verdict.outcome.value, verdict.first_difference, verdict.output_tokens)


def _adapter(engine: Engine, recorded: Recording) -> str | None:
    """Return the name that the recorded adapter has here."""
    adapter = engine.versions[recorded.version].adapter
    return adapter.name if adapter is not None else None


def _verdict(engine: Engine, recorded: Recording, choices: list[ChoiceReplay], mode: Mode) -> Replay:
    outcomes = {choice.outcome for choice in choices}
    weakest = next(
        outcome.value
        for outcome in (ReplayOutcome.DIFFERENT, ReplayOutcome.CONSISTENT, ReplayOutcome.IDENTICAL)
        if outcome.value in outcomes
    )
    first = next((choice for choice in choices if choice.outcome == ReplayOutcome.DIFFERENT.value), None)
    return Replay(
        request_id=recorded.request_id,
        mode=mode,
        outcome=weakest,
        first_difference=None if first is None else first.first_difference,
        model=recorded.version,
        recorded_engine=recorded.engine,
        engine=engine.numeric_policy,
        choices=tuple(choices),
    )


def _sampling(stated: Mapping[str, Any], asked: InferenceRequest) -> SamplingParams:
    """Return the sampling that a leaf states. Decimals read back as the doubles they were.

    Stop strings, token ids and structures are content: they stand in the body as sent.
    """
    if isinstance(asked, EmbeddingsRequest):
        return SamplingParams(max_tokens=1, seed=0)  # nothing is sampled
    return SamplingParams(
        max_tokens=stated["max_tokens"],
        seed=int(stated["seed"]),
        temperature=float(stated["temperature"]),
        top_p=float(stated["top_p"]),
        top_k=stated["top_k"],
        min_p=float(stated["min_p"]),
        stop=asked.stops,
        ignore_eos=stated["ignore_eos"],
        logit_bias=asked.biases,
        repetition_penalty=float(stated.get("repetition_penalty", "1")),
        frequency_penalty=float(stated.get("frequency_penalty", "0")),
        presence_penalty=float(stated.get("presence_penalty", "0")),
        allowed_tokens=asked.allowed_tokens,
        stop_tokens=asked.stop_tokens,
        min_tokens=stated.get("min_tokens", 0),
    )


def _asked(action: str, body: bytes) -> InferenceRequest:
    """Return the body as sent."""
    try:
        return read_body(action, body)
    except (MalformedJson, ValidationError, KeyError):
        raise ReplayRefused("the body as sent is of a form that this version of the gateway does not read") from None
