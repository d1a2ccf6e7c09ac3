"""What a request's spans say, in OpenTelemetry's names for generative AI. Pure: values in, attributes out.

    probity.answer ─┬─ probity.decide ── probity.record      the caller's call, until its prompt is on record
                    └─ probity.generate ── probity.close     the governed task, to its closing record

Nothing here is of a person or of content: digests, counts, parameters, and an alias only as the policy writes it.
"""

from __future__ import annotations

from collections.abc import Sequence

from gateway import semantic_conventions as names
from gateway.grant import Grant
from gateway.telemetry import Attributes

_OPERATIONS = {"chat.completions": "chat", "completions": "text_completion", "responses": "chat"}
PROVIDER = "probity"


def asked(action: str, request_id: str, tenant: str) -> Attributes:
    return {
        names.OPERATION_NAME: _OPERATIONS.get(action, action),
        names.PROVIDER_NAME: PROVIDER,
        names.REQUEST_ID: request_id,
        names.TENANT: tenant,
    }


def granted(grant: Grant) -> Attributes:
    question, sampling = grant.question, grant.sampling
    return {
        **asked(question.action, question.request_id, question.principal.tenant),
        names.REQUEST_MODEL: grant.obligations.model.alias,
        names.RESPONSE_MODEL: grant.model.digest,
        names.REQUEST_MAX_TOKENS: sampling.max_tokens,
        names.REQUEST_TEMPERATURE: sampling.temperature,
        names.REQUEST_TOP_P: sampling.top_p,
        names.REQUEST_CHOICE_COUNT: question.request.choices,
        names.REQUEST_STREAM: question.request.stream,
        names.POLICY_DIGEST: grant.decision.policy,
        names.DECISION_EFFECT: str(grant.decision.effect),
    }


def generated(prompt_tokens: int, cached_tokens: int, output_tokens: int, finish_reasons: Sequence[str]) -> Attributes:
    return {
        names.USAGE_INPUT_TOKENS: prompt_tokens,
        names.USAGE_CACHED_TOKENS: cached_tokens,
        names.USAGE_OUTPUT_TOKENS: output_tokens,
        names.RESPONSE_FINISH_REASONS: list(finish_reasons),
    }
