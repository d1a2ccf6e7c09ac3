"""Tools in a chat: the functions a model may call, which of them it must, and calls that stand in messages.

Source: the OpenAI API reference; names and ranges are its own.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StrictStr, field_validator

from engine.message_grammar import Function, ToolUse
from gateway.strict_json import MalformedJson, parse_json

MAX_TOOLS = 128

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


def _checked_name(name: str) -> str:
    if _NAME.fullmatch(name) is None:
        raise ValueError("the name of a function is made of 1 to 64 letters, digits, `_` and `-`")
    return name


FunctionName = Annotated[StrictStr, AfterValidator(_checked_name)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FunctionDefinition(_Part):
    """Its schema is enforced whatever `strict` says."""

    name: FunctionName
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None

    @field_validator("parameters")
    @classmethod
    def _arguments_are_an_object(cls, parameters: dict[str, Any] | None) -> dict[str, Any] | None:
        if not parameters:
            return None
        if parameters.get("type", "object") != "object":
            raise ValueError("the `parameters` of a function have the type `object`")
        return parameters if "type" in parameters else {"type": "object", **parameters}

    @property
    def function(self) -> Function:
        return Function(self.name, None if self.parameters is None else json.dumps(self.parameters))


class Tool(_Part):
    type: Literal["function"]
    function: FunctionDefinition

    def shown(self) -> dict[str, Any]:
        """Return what the chat template is given."""
        return self.model_dump(exclude_none=True, exclude={"function": {"strict"}})


class NamedFunction(_Part):
    name: FunctionName


class NamedTool(_Part):
    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class CalledFunction(_Part):
    name: FunctionName
    arguments: StrictStr  # JSON text

    @field_validator("arguments")
    @classmethod
    def _arguments_are_an_object(cls, arguments: str) -> str:
        try:
            read = parse_json(arguments.encode()) if arguments.strip() else {}
        except (MalformedJson, UnicodeEncodeError):
            raise ValueError("the `arguments` of a call are a JSON object, as text") from None
        if not isinstance(read, dict):
            raise ValueError("the `arguments` of a call are a JSON object, as text")
        return arguments


class ToolCall(_Part):
    id: Annotated[StrictStr, Field(min_length=1, max_length=64)]
    type: Literal["function"] = "function"
    function: CalledFunction

    def shown(self) -> dict[str, Any]:
        """Return what the chat template is given: templates write the arguments themselves."""
        arguments = self.function.arguments
        read = parse_json(arguments.encode()) if arguments.strip() else {}
        return {"id": self.id, "type": "function", "function": {"name": self.function.name, "arguments": read}}


def tool_use(tools: list[Tool], choice: ToolChoice | None, *, parallel: bool) -> ToolUse | None:
    """Return what an answer may call; None where it may call nothing. A named function is one of `tools`."""
    if not tools or choice == "none":
        return None
    functions = tuple(tool.function.function for tool in tools)
    if isinstance(choice, NamedTool):
        functions = tuple(one for one in functions if one.name == choice.function.name)
        return ToolUse(functions, required=True, parallel=False)
    return ToolUse(functions, required=choice == "required", parallel=parallel)
