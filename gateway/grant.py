"""What passes from deciding to generating: the question as it arrived, and the grant made of it. Values only."""

from __future__ import annotations

from dataclasses import dataclass

from engine.request import SamplingParams
from gateway.schemas.inference import InferenceRequest
from policies.decision import Decision, Obligations
from policies.guardrails import Verdict
from policies.request import Principal


@dataclass(frozen=True, slots=True)
class Question:
    """What arrived, authenticated and well-formed."""

    request_id: str  # UUIDv7
    principal: Principal
    action: str  # chat.completions | completions
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
    rendered: str  # the prompt text for the model, after input guardrails
    prompt: tuple[int, ...]  # its tokens
    sampling: SamplingParams  # of choice 0
    verdicts: tuple[Verdict, ...]  # of the input guardrails
    decided: float  # monotonic seconds

    @property
    def reserved_tokens(self) -> int:
        """Prompt and longest possible output, all choices."""
        return len(self.prompt) + self.question.request.choices * self.sampling.max_tokens
