"""The body of `/v1/embeddings`.

Source: the OpenAI API reference; `pooling` is ours. Token ids are refused: guardrails read text, and ids mean something
only to the tokenizer that made them.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictStr, WithJsonSchema, field_validator

from engine.request import Pooling
from gateway.schemas.inference import ModelAlias

MAX_INPUTS = 128

_ONE_OR_MORE = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
Text = Annotated[StrictStr, Field(min_length=1)]


class EmbeddingsRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    model: ModelAlias
    input: Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS), WithJsonSchema(_ONE_OR_MORE)]
    encoding_format: Literal["float", "base64"] | None = None
    pooling: Pooling = Pooling.LAST
    dimensions: None = None
    user: Annotated[StrictStr, Field(max_length=256)] | None = None

    prompt_field: ClassVar[str] = "input"
    # What it asks of a policy.
    stream: ClassVar[bool] = False
    choices: ClassVar[int] = 1
    token_limit: ClassVar[int | None] = None
    temperature: ClassVar[Decimal | None] = None
    top_p: ClassVar[Decimal | None] = None
    wants_logprobs: ClassVar[bool] = False
    priority: ClassVar[int] = 0

    @field_validator("input", mode="before")
    @classmethod
    def _texts_only(cls, value: object) -> object:
        first = value[0] if isinstance(value, list) and value else None
        if isinstance(first, int | list):
            raise ValueError("`input` is made of token ids; send texts")
        return [value] if isinstance(value, str) else value

    @field_validator("dimensions", mode="before")
    @classmethod
    def _whole_vectors_only(cls, value: object) -> None:
        if value is not None:
            raise ValueError("`dimensions` is not supported by this server; leave it out")

    @property
    def outputs(self) -> int:
        """How many the answer is made of."""
        return len(self.input)
