"""Diagnostics: a line holds what is on the list of what may pass, whoever wrote it and whatever was said."""

from __future__ import annotations

import io
import json
import logging
import sys
import threading
from collections.abc import Iterator

import pytest

from gateway.diagnostics import DiagnosticsFormatter, install_diagnostics
from gateway.error_responses import note_failure, report_model_reading

CANARY = "canary 4929 1234"


@pytest.fixture(autouse=True)
def hooks() -> Iterator[None]:
    """The runner has hooks of its own, which go on after a test that installed others."""
    before = threading.excepthook, sys.unraisablehook
    yield
    threading.excepthook, sys.unraisablehook = before


def line_of(
    logger_name: str, message: object, *values: object, exc_info: bool = False, **fields: object
) -> dict[str, object]:
    """Write one record through a real handler and return what came out."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(DiagnosticsFormatter())
    logger = logging.getLogger(logger_name)
    logger.addHandler(handler)
    logger.propagate = False
    try:
        logger.error(message, *values, exc_info=exc_info, extra=fields)
    finally:
        logger.removeHandler(handler)
        logger.propagate = True
    lines = stream.getvalue().splitlines()
    assert len(lines) == 1
    assert CANARY not in lines[0]
    return dict(json.loads(lines[0]))


def test_our_events_carry_their_named_fields() -> None:
    line = line_of("probity.errors", "request_failed", code="overloaded", status=503, count=2, duration_ms=1.5)
    assert line["event"] == "request_failed"
    assert (line["code"], line["status"], line["count"], line["duration_ms"]) == ("overloaded", 503, 2, 1.5)
    assert str(line["time"]).endswith("Z")


@pytest.mark.parametrize("field", ["code", "reason", "model", "error_types", "prompt", "body", "args_"])
def test_a_sentence_passes_in_no_field(field: str) -> None:
    assert field not in line_of("probity.x", "event", **{field: CANARY})
    assert line_of("probity.x", "event", **{field: [CANARY]}).get(field, []) == []


@pytest.mark.parametrize("message", [CANARY, f"failed on {CANARY}", "%s", {"a": CANARY}, ValueError(CANARY)])
def test_a_message_that_is_not_an_event_is_not_repeated(message: object) -> None:
    values = (CANARY,) if message == "%s" else ()
    assert line_of("probity.x", message, *values)["event"] == "unnamed"


@pytest.mark.parametrize("library", ["sqlalchemy.engine", "httpx", "asyncio", "probityx", "root.probity"])
def test_a_library_tells_its_place_and_none_of_its_words(library: str) -> None:
    line = line_of(library, "row %s", CANARY)
    assert line["event"] == "library"
    assert str(line["place"]).startswith("test_diagnostics.py:")


def test_the_servers_templates_pass_without_their_values() -> None:
    assert line_of("uvicorn.error", "listening on %s\n", CANARY)["template"] == "listening on %s"


def test_an_exception_leaves_its_type() -> None:
    try:
        raise LookupError(CANARY)
    except LookupError:
        line = line_of("uvicorn.error", "failed", exc_info=True)
    assert line["error_types"] == ["builtins.LookupError"]


def test_a_failure_is_noted_by_types_and_places() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(DiagnosticsFormatter())
    logger = logging.getLogger("probity.errors")
    logger.addHandler(handler)
    try:
        try:
            try:
                json.loads(CANARY)
            except ValueError as error:
                raise RuntimeError(CANARY) from error
        except RuntimeError as error:
            note_failure("request_failed", error)
    finally:
        logger.removeHandler(handler)
    line = json.loads(stream.getvalue())
    assert line["error_types"] == ["builtins.RuntimeError", "json.decoder.JSONDecodeError"]
    assert line["error_places"][0].startswith("test_diagnostics.py:")
    assert CANARY not in stream.getvalue()
    assert sys.exc_info() == (None, None, None)


def test_installed_diagnostics_take_every_logger_and_drop_access_lines() -> None:
    stream, root = io.StringIO(), logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        install_diagnostics(stream)
        logging.getLogger("uvicorn.access").info('"GET /audit/requests?subject=%s"', CANARY)
        logging.getLogger("uvicorn.error").info("started with %s", CANARY)
        logging.getLogger("somebody.else").error(CANARY)
        logging.getLogger("probity.app").info("serving", extra={"port": 8080})
        for done in (0, 5, 9):
            report_model_reading("model-00001-of-00002.safetensors", done, 9)
    finally:
        logging.captureWarnings(False)
        root.handlers[:] = before
        root.setLevel(level)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["event"] for line in lines] == ["server", "library", "serving", "model_file_read"]
    assert lines[2]["port"] == 8080
    assert (lines[3]["component"], lines[3]["count"]) == ("model-00001-of-00002.safetensors", 9)
    assert CANARY not in stream.getvalue()


class _Spoilt:
    def __del__(self) -> None:
        raise ValueError(CANARY)


def test_what_ends_a_thread_or_a_finaliser_is_noted_without_its_message(capfd: pytest.CaptureFixture[str]) -> None:
    """The audit writer is such a thread, and what it fails on may be a prompt."""

    def fail() -> None:
        raise ValueError(CANARY)

    root = logging.getLogger()
    before, level, stream = root.handlers[:], root.level, io.StringIO()
    try:
        install_diagnostics(stream)
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
        spoilt: object = _Spoilt()
        del spoilt
    finally:
        logging.captureWarnings(False)
        root.handlers[:] = before
        root.setLevel(level)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(line["event"], line["error_types"]) for line in lines] == [
        ("thread_failed", ["builtins.ValueError"]),
        ("finaliser_failed", ["builtins.ValueError"]),
    ]
    assert CANARY not in stream.getvalue() + "".join(capfd.readouterr())
