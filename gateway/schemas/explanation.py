"""The body of `/v1/policy/explain`: a request as it would be sent, and to which endpoint."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class ExplainBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    action: Literal["chat.completions", "completions", "embeddings", "responses"] = "chat.completions"
    request: dict[str, Any]
