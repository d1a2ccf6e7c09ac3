"""The bodies of `/v1/chat/completions` and `/v1/completions`: read strictly, refused by field name.

A field that this version cannot honour is refused when it asks for something, and accepted when it says "nothing":
`tools: []`, `store: false`. An unknown field is refused. Nothing is dropped
without a word.

Source: the OpenAI API reference; names and ranges are its own. `top_k`, `min_p`, `ignore_eos`, `repetition_penalty`,
`min_tokens`, `stop_token_ids`, `allowed_token_ids` and `structured_outputs` are the extensions that vLLM established.
"""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from engine.request import Structure, StructureKind

MAX_CHOICES = 16
MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20
MAX_BIASED_TOKENS = 1024
MAX_ALLOWED_TOKENS = 1024

Probability = Annotated[Decimal, Field(gt=0, le=1)]
Penalty = Annotated[Decimal, Field(ge=-2, le=2)]
Bias = Annotated[Decimal, Field(ge=-100, le=100)]
TokenId = Annotated[StrictInt, Field(ge=0, lt=2**31)]
TokenText = Annotated[StrictStr, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")]  # one way to write each id
StopString = Annotated[StrictStr, Field(min_length=1, max_length=256)]

# Fields that would change the answer and are not honoured yet, with the values that ask for nothing. Null always does.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
}


class UnsupportedField(ValueError):
    """A field asks for something this version cannot do."""

    def __init__(self, name: str) -> None:
        super().__init__(f"`{name}` is not supported by this server; leave it out")
        self.name = name


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TextPart(_Body):
    type: Literal["text"]
    text: StrictStr


class Message(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: StrictStr | list[TextPart]
    name: StrictStr | None = None

    @field_validator("name")
    @classmethod
    def _no_template_shows_a_name(cls, name: str | None) -> None:
        """The model would not see it; a caller who counts on it must know."""
        if name is not None:
            raise ValueError("`name` of a message is not supported by this server; leave it out")

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(_Body):
    include_usage: StrictBool = False


class JsonSchema(_Body):
    """A schema is enforced whatever `strict` says."""

    name: Annotated[StrictStr, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]
    schema_: dict[str, Any] = Field(alias="schema")
    description: StrictStr | None = None
    strict: StrictBool | None = None


class ResponseFormat(_Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _a_schema_is_there_where_one_is_meant(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("`json_schema` stands with the type `json_schema`, and with no other")
        return self


class StructuredOutputs(_Body):
    """One of them."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    json_: dict[str, Any] | None = Field(None, alias="json")
    regex: StrictStr | None = None
    choice: Annotated[list[StrictStr], Field(min_length=1, max_length=1024)] | None = None
    grammar: StrictStr | None = None  # Lark

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if sum(value is not None for value in (self.json_, self.regex, self.choice, self.grammar)) != 1:
            raise ValueError("give one of `json`, `regex`, `choice` and `grammar`")
        return self

    @property
    def structure(self) -> Structure:
        if self.json_ is not None:
            return Structure(StructureKind.JSON_SCHEMA, json.dumps(self.json_))
        if self.regex is not None:
            return Structure(StructureKind.REGEX, self.regex)
        if self.choice is not None:
            return Structure(StructureKind.CHOICE, json.dumps(self.choice))
        assert self.grammar is not None  # exactly one
        return Structure(StructureKind.LARK, self.grammar)


class _InferenceBody(_Body):
    """What both endpoints share."""

    model: Annotated[StrictStr, Field(min_length=1, max_length=128, pattern=r"^[^\x00]*$")]  # it stands in a column
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    temperature: Annotated[Decimal, Field(ge=0, le=2)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[StrictInt, Field(ge=0)] | None = None
    min_p: Annotated[Decimal, Field(ge=0, le=1)] | None = None
    n: Annotated[StrictInt, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: Annotated[StrictInt, Field(ge=0, le=2**63 - 1)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    ignore_eos: StrictBool = False
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[Decimal, Field(gt=0, le=2)] | None = None
    logit_bias: Annotated[dict[TokenText, Bias], Field(max_length=MAX_BIASED_TOKENS)] | None = None
    min_tokens: Annotated[StrictInt, Field(ge=0)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOPS)] | None = None
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1, max_length=MAX_ALLOWED_TOKENS)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    user: Annotated[StrictStr, Field(max_length=256)] | None = None
    metadata: dict[str, str] | None = None

    @model_validator(mode="before")
    @classmethod
    def _accept_neutral_fields(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        kept = dict(body)
        for name in _NEUTRAL.keys() & kept.keys():
            value = kept.pop(name)
            if value is not None and value not in _NEUTRAL[name]:
                raise UnsupportedField(name)
        return kept

    @field_validator("min_tokens")
    @classmethod
    def _min_is_below_max(cls, least: int | None, info: ValidationInfo) -> int | None:
        most = info.data.get("max_tokens")
        if least is not None and most is not None and least > most:
            raise ValueError("`min_tokens` is at most `max_tokens`")
        return least

    @field_validator("structured_outputs")
    @classmethod
    def _one_structure(cls, outputs: StructuredOutputs | None, info: ValidationInfo) -> StructuredOutputs | None:
        stated = info.data.get("response_format")
        if outputs is not None and stated is not None and stated.type != "text":
            raise ValueError("`structured_outputs` and `response_format` say two things; give one")
        return outputs

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("`stream_options` is only allowed with `stream`")
        return self

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """By token id, ascending; a bias of nothing is none."""
        stated = {int(token): float(bias) for token, bias in (self.logit_bias or {}).items()}
        return tuple(sorted((token, bias) for token, bias in stated.items() if bias != 0))

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        return tuple(sorted(set(self.stop_token_ids or ())))

    @property
    def allowed_tokens(self) -> tuple[int, ...]:
        return tuple(sorted(set(self.allowed_token_ids or ())))

    @property
    def structure(self) -> Structure | None:
        """What the whole answer must look like."""
        if self.structured_outputs is not None:
            return self.structured_outputs.structure
        if self.response_format is None or self.response_format.type == "text":
            return None
        stated = self.response_format.json_schema
        schema = {"type": "object"} if stated is None else stated.schema_
        return Structure(StructureKind.JSON_SCHEMA, json.dumps(schema))

    @property
    def structure_field(self) -> str:
        """The field that asked for it."""
        return "response_format" if self.structured_outputs is None else "structured_outputs"

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(_InferenceBody):
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("`top_logprobs` is only allowed with `logprobs`")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give `max_completion_tokens` or `max_tokens`, not both")
        return self

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.logprobs)

    @property
    def alternatives(self) -> int:
        """How many of the likeliest tokens are reported beside the chosen one."""
        return self.top_logprobs or 0


class CompletionRequest(_InferenceBody):
    prompt: StrictStr | Annotated[list[StrictStr], Field(min_length=1, max_length=1)]
    logprobs: Annotated[StrictInt, Field(ge=0, le=5)] | None = None

    @property
    def text(self) -> str:
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None

    @property
    def alternatives(self) -> int:
        return self.logprobs or 0


InferenceRequest = ChatRequest | CompletionRequest
