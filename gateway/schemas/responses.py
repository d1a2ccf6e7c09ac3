"""The body of `/v1/responses`, stateless: nothing is kept to be continued, every request brings its whole conversation.

It asks for a chat, in other words: `chat` says it in those of `/v1/chat/completions`, which are what is decided on,
rendered and replayed.

Source: the OpenAI API reference; `seed` and `chat_template_kwargs` are the extensions that vLLM established.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, field_validator, model_validator

from gateway.schemas.inference import (
    ChatRequest,
    ModelAlias,
    Probability,
    Temperature,
    TemplateValue,
    UnsupportedField,
)
from gateway.schemas.tools import MAX_TOOLS, FunctionName

MAX_ITEMS = 4096
LOGPROBS = "message.output_text.logprobs"

CallId = Annotated[StrictStr, Field(min_length=1, max_length=64)]

# Fields that are not honoured, with the values that ask for nothing. Null always does.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "background": (False,),
    "conversation": (),
    "max_tool_calls": (),
    "moderation": (),
    "previous_response_id": (),
    "prompt": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "stream_options": ({}, {"include_obfuscation": False}),
    "truncation": ("disabled",),
}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Item(_Part):
    """What an answer's item brings beside, and is of no use here."""

    id: StrictStr | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class TextContent(_Part):
    type: Literal["input_text", "output_text"]
    text: StrictStr
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: list[Any] | None = None


class MessageItem(_Item):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: StrictStr | list[TextContent]
    phase: StrictStr | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class CallItem(_Item):
    type: Literal["function_call"]
    call_id: CallId
    name: FunctionName
    arguments: StrictStr


class ResultItem(_Item):
    type: Literal["function_call_output"]
    call_id: CallId
    output: StrictStr | list[TextContent]

    @property
    def text(self) -> str:
        return self.output if isinstance(self.output, str) else "".join(part.text for part in self.output)


class ReasoningText(_Part):
    type: Literal["reasoning_text"]
    text: StrictStr


class ReasoningItem(_Item):
    type: Literal["reasoning"]
    summary: Annotated[list[Any], Field(max_length=0)] = []
    content: list[ReasoningText] | None = None
    encrypted_content: None = None

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content or ())


Item = MessageItem | CallItem | ResultItem | ReasoningItem


class FunctionTool(_Part):
    type: Literal["function"]
    name: FunctionName
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None

    def chat(self) -> dict[str, Any]:
        return {"type": "function", "function": self.model_dump(exclude={"type"})}


class NamedTool(_Part):
    type: Literal["function"]
    name: FunctionName


class TextFormat(_Part):
    type: Literal["text", "json_object", "json_schema"]
    name: StrictStr | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    description: StrictStr | None = None
    strict: StrictBool | None = None

    @model_validator(mode="after")
    def _a_schema_is_there_where_one_is_meant(self) -> Self:
        if (self.type == "json_schema") != (self.schema_ is not None and self.name is not None):
            raise ValueError("`name` and `schema` stand with the type `json_schema`, and with no other")
        return self

    def chat(self) -> dict[str, Any]:
        if self.schema_ is None:
            return {"type": self.type}
        return {"type": self.type, "json_schema": {"name": self.name, "schema": self.schema_, "strict": self.strict}}


class TextOptions(_Part):
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(_Part):
    """A model thinks as much as it does."""

    effort: None = None
    summary: None = None
    generate_summary: None = None


class _Chat(ChatRequest):
    prompt_field: ClassVar[str] = "input"


class ResponsesRequest(_Part):
    model: ModelAlias
    input: Annotated[list[Item], Field(min_length=1, max_length=MAX_ITEMS)]
    instructions: StrictStr | None = None
    stream: StrictBool = False
    max_output_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    seed: Annotated[StrictInt, Field(ge=0, le=2**63 - 1)] | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    include: list[Literal["message.output_text.logprobs"]] | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: StrictBool | None = None
    chat_template_kwargs: dict[StrictStr, TemplateValue] | None = None
    metadata: dict[str, str] | None = None
    user: Annotated[StrictStr, Field(max_length=256)] | None = None
    safety_identifier: Annotated[StrictStr, Field(max_length=256)] | None = None
    prompt_cache_key: Annotated[StrictStr, Field(max_length=256)] | None = None

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

    @field_validator("input", mode="before")
    @classmethod
    def _a_text_is_one_message(cls, value: object) -> object:
        return [{"role": "user", "content": value}] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.top_logprobs is not None and not self.include:
            raise ValueError(f"`top_logprobs` is only allowed where `include` names `{LOGPROBS}`")
        return self

    def chat(self) -> ChatRequest:
        """Return the same request in the words of a chat.

        Raises: ValidationError: what it says together cannot be asked.
        """
        choice = self.tool_choice
        if isinstance(choice, NamedTool):
            wanted: object = {"type": "function", "function": {"name": choice.name}}
        else:
            wanted = choice
        form = self.text.format if self.text is not None else None
        return _Chat.model_validate(
            {
                "model": self.model,
                "messages": self._messages(),
                "stream": self.stream,
                "max_completion_tokens": self.max_output_tokens,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "seed": self.seed,
                "logprobs": bool(self.include),
                "top_logprobs": self.top_logprobs,
                "response_format": form.chat() if form is not None else None,
                "tools": [tool.chat() for tool in self.tools] if self.tools else None,
                "tool_choice": wanted,
                "parallel_tool_calls": self.parallel_tool_calls,
                "chat_template_kwargs": self.chat_template_kwargs,
            }
        )

    def _messages(self) -> list[dict[str, Any]]:
        """Thoughts, words and calls of one answer are items of their own here, and one message there."""
        messages: list[dict[str, Any]] = []
        if self.instructions is not None:
            messages.append({"role": "system", "content": self.instructions})
        answering = False  # the latest message is an answer that further items belong to
        for item in self.input:
            if isinstance(item, ResultItem):
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": item.text})
            elif isinstance(item, MessageItem) and item.role != "assistant":
                messages.append({"role": item.role, "content": item.text})
            else:
                if not answering or isinstance(item, ReasoningItem):
                    messages.append({"role": "assistant", "content": ""})
                _answer_with(messages[-1], item)
            answering = messages[-1]["role"] == "assistant"
        return messages


def _answer_with(message: dict[str, Any], item: MessageItem | CallItem | ReasoningItem) -> None:
    if isinstance(item, MessageItem):
        message["content"] += item.text
    elif isinstance(item, ReasoningItem):
        message["reasoning_content"] = item.text
    else:
        function = {"name": item.name, "arguments": item.arguments}
        message.setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": function})
