"""What passes from deciding to generating: the question as it arrived, and the grant made of it. Values only."""

from __future__ import annotations

from dataclasses import dataclass

import orjson

from engine.request import ModelVersion, SamplingParams
from gateway.schemas.bodies import InferenceRequest
from gateway.schemas.embeddings import EmbeddingsRequest
from policies.decision import Decision, Obligations
from policies.guardrails import Verdict
from policies.request import Principal


@dataclass(frozen=True, slots=True)
class Question:
    """What arrived, authenticated and well-formed."""

    request_id: str  # UUIDv7
    principal: Principal
    action: str  # chat.completions | completions | embeddings | responses
    request: InferenceRequest
    body: bytes  # as sent
    source: str | None  # the client's address
    received: float  # monotonic seconds


@dataclass(frozen=True, slots=True)
class Grant:
    """A question that may be answered, and what the policy made of it."""

    question: Question
    decision: Decision
    obligations: Obligations
    rendered: tuple[str, ...]  # what the model is given, after input guardrails: one prompt; of embeddings, each input
    prompts: tuple[tuple[int, ...], ...]  # their tokens
    sampling: SamplingParams  # of choice 0
    model: ModelVersion  # what answers
    verdicts: tuple[Verdict, ...]  # of the input guardrails
    decided: float  # monotonic seconds

    @property
    def reserved_tokens(self) -> int:
        """Prompts and longest possible output, all choices."""
        if isinstance(self.question.request, EmbeddingsRequest):
            return self.prompt_tokens
        return self.prompt_tokens + self.question.request.choices * self.sampling.max_tokens

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def prompt_to_model(self) -> bytes:
        """What the log keeps of it: the prompt, or a JSON list of all inputs."""
        if isinstance(self.question.request, EmbeddingsRequest):
            return orjson.dumps(self.rendered)
        return self.rendered[0].encode()
