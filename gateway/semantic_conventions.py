"""The names of span attributes: OpenTelemetry's for generative AI, and ours.

Copied into one module because the convention is still moving. The names that carry content (`gen_ai.prompt`,
`gen_ai.input.messages`, `gen_ai.output.messages`, tool arguments, system instructions) are left out on purpose: what
has no name here cannot be put on a span.

Source: OpenTelemetry semantic conventions, generative AI, release 1.38.
"""

from __future__ import annotations

from typing import Final

OPERATION_NAME: Final = "gen_ai.operation.name"
PROVIDER_NAME: Final = "gen_ai.provider.name"
REQUEST_MODEL: Final = "gen_ai.request.model"
REQUEST_MAX_TOKENS: Final = "gen_ai.request.max_tokens"
REQUEST_TEMPERATURE: Final = "gen_ai.request.temperature"
REQUEST_TOP_P: Final = "gen_ai.request.top_p"
REQUEST_TOP_K: Final = "gen_ai.request.top_k"
REQUEST_CHOICE_COUNT: Final = "gen_ai.request.choice.count"
REQUEST_STREAM: Final = "gen_ai.request.stream"
RESPONSE_ID: Final = "gen_ai.response.id"
RESPONSE_MODEL: Final = "gen_ai.response.model"
RESPONSE_FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
RESPONSE_TIME_TO_FIRST_CHUNK: Final = "gen_ai.response.time_to_first_chunk"
USAGE_INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
USAGE_OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
USAGE_CACHED_TOKENS: Final = "gen_ai.usage.cache_read.input_tokens"
ERROR_TYPE: Final = "error.type"

TENANT: Final = "probity.tenant"
REQUEST_ID: Final = "probity.request_id"
POLICY_DIGEST: Final = "probity.policy"
DECISION_EFFECT: Final = "probity.decision"
ERROR_CODE: Final = "probity.error_code"

KNOWN_ATTRIBUTES: Final = frozenset(
    {
        *(OPERATION_NAME, PROVIDER_NAME, REQUEST_MODEL, REQUEST_MAX_TOKENS, REQUEST_TEMPERATURE, REQUEST_TOP_P),
        *(REQUEST_TOP_K, REQUEST_CHOICE_COUNT, REQUEST_STREAM, RESPONSE_ID, RESPONSE_MODEL, RESPONSE_FINISH_REASONS),
        *(RESPONSE_TIME_TO_FIRST_CHUNK, USAGE_INPUT_TOKENS, USAGE_OUTPUT_TOKENS, USAGE_CACHED_TOKENS, ERROR_TYPE),
        *(TENANT, REQUEST_ID, POLICY_DIGEST, DECISION_EFFECT, ERROR_CODE),
    }
)
