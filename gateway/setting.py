"""One setting: how it is declared, recognised and explained.

Knows no setting by name; settings.py declares them.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True)
class Kind:
    """How a value is recognised. `read` returns the value, or raises ValueError saying what it must be."""

    form: str  # for the table and for messages
    read: Callable[[object], Any]
    from_text: Callable[[str], object]  # environment text → what TOML would have held


def setting(default: object, kind: Kind, doc: str, *, secret: bool = False) -> Any:
    return field(default=default, repr=not secret, metadata={"kind": kind, "doc": doc})


def number(convert: type[int] | type[float], low: float, high: float, unit: str) -> Kind:
    what = "an integer" if convert is int else "a number"
    form = f"{low:,} … {high:,} {unit}".rstrip()

    def read(value: object) -> int | float:
        accepted = int if convert is int else (int, float)
        if isinstance(value, bool) or not isinstance(value, accepted) or not low <= value <= high:
            raise ValueError(f"must be {what}, {form}")
        return convert(value)

    def from_text(text: str) -> object:
        try:
            return convert(text)
        except ValueError:
            raise ValueError(f"must be {what}, {form}") from None

    return Kind(form, read, from_text)


def integer_kind(low: int, high: int, unit: str = "") -> Kind:
    return number(int, low, high, unit)


def decimal_kind(low: float, high: float, unit: str = "") -> Kind:
    return number(float, low, high, unit)


def text_kind(form: str, accepts: Callable[[str], bool]) -> Kind:
    def read(value: object) -> str:
        if not isinstance(value, str) or not accepts(value):
            raise ValueError(f"must be {form}")
        return value

    return Kind(form, read, lambda text: text)


def path_kind(form: str) -> Kind:
    def read(value: object) -> Path:
        if isinstance(value, Path):
            return value
        if not isinstance(value, str) or not value or "\0" in value:
            raise ValueError(f"must be {form}")
        return Path(value)

    return Kind(form, read, lambda text: text)


def list_kind(form: str, accepts: Callable[[str], bool], *, at_least: int) -> Kind:
    def read(value: object) -> tuple[str, ...]:
        if not isinstance(value, list) or not at_least <= len(value) <= 64:
            raise ValueError(f"must be {form}")
        if not all(isinstance(member, str) and accepts(member) for member in value):
            raise ValueError(f"must be {form}")
        return tuple(value)

    return Kind(form, read, lambda text: [part.strip() for part in text.split(",")])


PRINTABLE = re.compile(r"[\x21-\x7e]{1,512}")


def is_database_url(text: str) -> bool:
    return bool(re.match(r"(?:sqlite:///|postgresql(?:\+psycopg)?://)", text)) and "\0" not in text


def is_network(text: str) -> bool:
    try:
        ipaddress.ip_network(text)
    except ValueError:
        return False
    return True


def _is_loopback(host: str | None) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def is_safe_url(text: str) -> bool:
    """https anywhere, http on loopback only; no credentials and no fragment in the address."""
    try:
        url = urlsplit(text)
        host, port = url.hostname, url.port
    except ValueError:
        return False
    if not PRINTABLE.fullmatch(text) or not host or url.username is not None or url.fragment or port == 0:
        return False
    return url.scheme == "https" or (url.scheme == "http" and _is_loopback(host))


URL = text_kind("an https:// address (http:// on loopback only)", is_safe_url)
DATABASE_URL = text_kind("`sqlite:///PATH` or `postgresql+psycopg://…`", is_database_url)
