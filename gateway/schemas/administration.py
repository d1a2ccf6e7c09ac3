"""Wire types of administrators. Every change says why. Shapes only."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from gateway.schemas.oversight import Reason


class ChangeBody(BaseModel):
    """A change that needs nothing but a reason: activate, suspend, resume."""

    model_config = ConfigDict(extra="forbid", strict=True)

    reason: Reason


class RollbackBody(ChangeBody):
    to: Annotated[int, Field(ge=1, le=2**31 - 1)]  # number of the version to go back to


class VersionBody(ChangeBody):
    """A new version: the document as JSON, or as the YAML that its author wrote, in one text."""

    document: dict[str, Any] | str
