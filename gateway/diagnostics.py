"""Diagnostics: one JSON object a line on stderr, which can hold no body, prompt, output or credential.

It is a list of what may pass, not of what may not. Of our own loggers (`probity.…`): the event, which is a constant of
the code, and the few named fields below, bounded. Of every other library: logger, level and place; a message made by
somebody else may quote anything. The web server's own messages are constant templates and pass without their values.

    {"time":"2026-11-20T19:43:00.123Z","level":"error","logger":"probity.errors","event":"request_failed",
     "error_types":["builtins.KeyError"],"error_places":["pipeline.py:88"]}
"""

from __future__ import annotations

import logging
import re
import sys
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TextIO

import orjson

from gateway.error_responses import note_failure

MAX_TEXT_CHARS = 128
MAX_LIST = 16

_FIELDS = (
    *("request_id", "tenant", "code", "status", "reason", "issuer", "model", "setting", "component", "host", "port"),
    *("duration_ms", "count", "attempt", "error_types", "error_places"),
)
_PLAIN = re.compile(r"[A-Za-z0-9_.:/<>@*-]+")
_EVENT = re.compile(r"[a-z][a-z0-9_]{0,63}")
_TEMPLATES_OF = frozenset({"uvicorn.error"})


class DiagnosticsFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC)
            .isoformat(timespec="milliseconds")
            .replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        line.update(_content(record))
        if record.exc_info and record.exc_info[0] is not None:
            line["error_types"] = [f"{record.exc_info[0].__module__}.{record.exc_info[0].__qualname__}"]
        return orjson.dumps(line).decode()


def _content(record: logging.LogRecord) -> Mapping[str, object]:
    place = f"{record.filename}:{record.lineno}"
    template = record.msg if isinstance(record.msg, str) else ""
    if record.name == "probity" or record.name.startswith("probity."):
        event = template if _EVENT.fullmatch(template) else "unnamed"
        values = ((name, _bounded(getattr(record, name, None))) for name in _FIELDS)
        return {"event": event, **{name: value for name, value in values if value is not None}}
    if record.name in _TEMPLATES_OF:
        return {"event": "server", "template": template.strip()[:MAX_TEXT_CHARS], "place": place}
    return {"event": "library", "place": place}


def _bounded(value: object) -> object:
    """Return a value that may stand in a line: a number, or a short text without spaces; else None."""
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return value if len(value) <= MAX_TEXT_CHARS and _PLAIN.fullmatch(value) else None
    if isinstance(value, list):
        return [member for member in map(_bounded, value[:MAX_LIST]) if member is not None]
    return None


def install_diagnostics(stream: TextIO | None = None, level: int = logging.INFO) -> None:
    """Send every logger of the process through the formatter, and to nowhere else."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(DiagnosticsFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = name != "uvicorn.access"  # addresses hold ids and filters; requests are in the log anyway
    logging.captureWarnings(True)
    # What ends a thread or a finaliser is printed by the interpreter with its message, unless somebody is asked first.
    threading.excepthook = lambda failed: note_failure("thread_failed", failed.exc_value or failed.exc_type())
    sys.unraisablehook = lambda failed: note_failure("finaliser_failed", failed.exc_value or failed.exc_type())
