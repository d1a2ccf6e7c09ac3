"""Why a gateway does not start: every error by which a room says that it cannot keep its promise.

Their messages are made for the person who starts it: they name settings and files, never content or secrets. The
database's own errors may quote a URL, so only their kind is told.
"""

from __future__ import annotations

from sqlalchemy.exc import SQLAlchemyError

from audit.database import DatabaseRefused
from audit.keys import KeyRefused
from audit.keystore import KeyStoreError
from audit.ratchet import RatchetError
from audit.writer import LogError
from engine.config import EngineStartError
from gateway.auth.development import DevelopmentKeyUnsafe
from gateway.open_files import TooFewFiles


class NotServing(Exception):
    """The server ended at its start, or did not become ready in time; the message says which."""


START_REFUSALS: tuple[type[Exception], ...] = (
    DatabaseRefused,
    KeyRefused,
    KeyStoreError,
    RatchetError,
    LogError,
    EngineStartError,
    DevelopmentKeyUnsafe,
    TooFewFiles,
    NotServing,
    SQLAlchemyError,
    OSError,
)


def reason(refused: Exception) -> str:
    """Return what to tell the person at the terminal."""
    if isinstance(refused, SQLAlchemyError):
        return f"the database does not answer as it should ({type(refused).__name__}); check `database.url`"
    if isinstance(refused, OSError) and refused.filename is not None:
        return f"`{refused.filename}`: {refused.strerror}"
    return str(refused)
