"""The bodies of `/v1/chat/completions` and `/v1/completions`: read strictly, refused by field name.

A field that this version cannot honour is refused when it asks for something, and accepted when it says "nothing":
`functions: []`, `store: false`. An unknown field is refused. Nothing is dropped without a word.

Source: the OpenAI API reference; names and ranges are its own. `top_k`, `min_p`, `ignore_eos`, `repetition_penalty`,
`min_tokens`, `stop_token_ids`, `allowed_token_ids`, `structured_outputs`, `chat_template_kwargs` and
`reasoning_content` are the extensions that vLLM established.
"""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
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

from engine.message_grammar import ToolUse
from engine.request import Structure, StructureKind
from gateway.schemas.tools import MAX_TOOLS, NamedTool, Tool, ToolCall, ToolChoice, tool_use

MAX_CHOICES = 16
MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20
MAX_BIASED_TOKENS = 1024
MAX_ALLOWED_TOKENS = 1024

ModelAlias = Annotated[StrictStr, Field(min_length=1, max_length=128, pattern=r"^[^\x00]*$")]  # it stands in a column
# What a policy clamps stands in a leaf as it was asked: no more digits than a double needs, and no zeros behind.
Number = Annotated[Decimal, Field(max_digits=24), AfterValidator(Decimal.normalize)]
Temperature = Annotated[Number, Field(ge=0, le=2)]
Probability = Annotated[Number, Field(gt=0, le=1)]
Penalty = Annotated[Number, Field(ge=-2, le=2)]
Bias = Annotated[Number, Field(ge=-100, le=100)]
TokenId = Annotated[StrictInt, Field(ge=0, lt=2**31)]
TokenText = Annotated[StrictStr, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")]  # one way to write each id
TemplateValue = StrictBool | StrictInt | Annotated[StrictStr, Field(max_length=1024)]
StopString = Annotated[StrictStr, Field(min_length=1, max_length=256)]

# Fields that would change the answer and are not honoured yet, with the values that ask for nothing. Null always does.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
}
_NEUTRAL_WITHOUT_CHAT: dict[str, tuple[object, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
}
_EMPTY_IN_ANSWERS = ("refusal", "audio", "annotations", "function_call", "tool_calls")


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
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: StrictStr | list[TextPart] | None = None
    name: StrictStr | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: Annotated[StrictStr, Field(min_length=1, max_length=64)] | None = None
    reasoning_content: StrictStr | None = None

    @model_validator(mode="before")
    @classmethod
    def _accept_what_an_answer_says_beside(cls, message: Any) -> Any:
        """Callers send an answer back as they got it, with its empty members."""
        if not isinstance(message, dict):
            return message
        beside = _EMPTY_IN_ANSWERS if message.get("role") == "assistant" else ()
        return {name: value for name, value in message.items() if value or name not in beside}

    @model_validator(mode="after")
    def _parts_belong_to_the_role(self) -> Self:
        if self.role != "assistant" and (self.tool_calls is not None or self.reasoning_content is not None):
            raise ValueError("`tool_calls` and `reasoning_content` stand in messages of the role `assistant`")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("`tool_call_id` stands in every message of the role `tool`, and in no other")
        if self.content is None and not self.tool_calls:
            raise ValueError("`content` is only left out beside `tool_calls`")
        return self

    @field_validator("name")
    @classmethod
    def _no_template_shows_a_name(cls, name: str | None) -> None:
        """The model would not see it; a caller who counts on it must know."""
        if name is not None:
            raise ValueError("`name` of a message is not supported by this server; leave it out")

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())

    def shown(self) -> dict[str, Any]:
        """Return what the chat template is given."""
        message: dict[str, Any] = {"role": self.role, "content": self.text}
        if self.reasoning_content is not None:
            message["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            message["tool_calls"] = [call.shown() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


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

    model: ModelAlias
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_k: Annotated[StrictInt, Field(ge=0)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    n: Annotated[StrictInt, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: Annotated[StrictInt, Field(ge=0, le=2**63 - 1)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    ignore_eos: StrictBool = False
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=2)] | None = None
    logit_bias: Annotated[dict[TokenText, Bias], Field(max_length=MAX_BIASED_TOKENS)] | None = None
    min_tokens: Annotated[StrictInt, Field(ge=0)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOPS)] | None = None
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1, max_length=MAX_ALLOWED_TOKENS)] | None = None
    prompt_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    priority: Annotated[StrictInt, Field(ge=-1000, le=1000)] = 0  # among the tenant's own; the lower goes first
    user: Annotated[StrictStr, Field(max_length=256)] | None = None
    metadata: dict[str, str] | None = None

    _neutral: ClassVar[dict[str, tuple[object, ...]]] = _NEUTRAL

    @model_validator(mode="before")
    @classmethod
    def _accept_neutral_fields(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        kept = dict(body)
        for name in cls._neutral.keys() & kept.keys():
            value = kept.pop(name)
            if value is not None and value not in cls._neutral[name]:
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
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("`prompt_logprobs` is not allowed with `stream`")
        return self

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def outputs(self) -> int:
        """How many the answer is made of."""
        return self.choices

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
    def form(self) -> Structure | None:
        """What the words of the answer must look like."""
        if self.structured_outputs is not None:
            return self.structured_outputs.structure
        if self.response_format is None or self.response_format.type == "text":
            return None
        stated = self.response_format.json_schema
        schema = {"type": "object"} if stated is None else stated.schema_
        return Structure(StructureKind.JSON_SCHEMA, json.dumps(schema))

    @property
    def structure_field(self) -> str:
        """The field that asked for a structure."""
        return "response_format" if self.structured_outputs is None else "structured_outputs"

    @property
    def tool_use(self) -> ToolUse | None:
        """What the answer may call."""
        return None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(_InferenceBody):
    prompt_field: ClassVar[str] = "messages"

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: StrictBool | None = None
    chat_template_kwargs: Annotated[dict[StrictStr, TemplateValue], Field(max_length=16)] | None = None

    @field_validator("tools")
    @classmethod
    def _names_are_unique(cls, tools: list[Tool] | None) -> list[Tool] | None:
        names = [tool.function.name for tool in tools or ()]
        if len(set(names)) != len(names):
            raise ValueError("two of the `tools` have one name")
        return tools

    @field_validator("tool_choice")
    @classmethod
    def _a_choice_is_among_the_tools(cls, choice: ToolChoice | None, info: ValidationInfo) -> ToolChoice | None:
        names = [tool.function.name for tool in info.data.get("tools") or ()]
        wanted = choice.function.name in names if isinstance(choice, NamedTool) else bool(names)
        if choice not in (None, "none", "auto") and not wanted:
            raise ValueError("`tool_choice` asks for a function that is not among the `tools`")
        return choice

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.tool_use is not None and self.structured_outputs is not None:
            raise ValueError("`structured_outputs` and `tools` say two things; give one")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("`top_logprobs` is only allowed with `logprobs`")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give `max_completion_tokens` or `max_tokens`, not both")
        return self

    @property
    def tool_use(self) -> ToolUse | None:
        return tool_use(self.tools or [], self.tool_choice, parallel=self.parallel_tool_calls is not False)

    @property
    def structure_field(self) -> str:
        return super().structure_field if self.tool_use is None else "tools"

    @property
    def shown_tools(self) -> list[dict[str, Any]]:
        """What the chat template shows the model; nothing where it may call nothing."""
        return [tool.shown() for tool in self.tools or ()] if self.tool_use is not None else []

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
    prompt_field: ClassVar[str] = "prompt"
    _neutral: ClassVar[dict[str, tuple[object, ...]]] = _NEUTRAL | _NEUTRAL_WITHOUT_CHAT

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


TextRequest = ChatRequest | CompletionRequest  # what is answered with text
