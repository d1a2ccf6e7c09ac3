"""Secrets by their published shapes: cloud and forge keys, private keys, JWTs, and passwords that are assigned.

Source: the issuers' documentation of their key formats; RFC 7468 (PEM); RFC 7519 (JWT).
"""

from __future__ import annotations

from collections.abc import Iterator

import re2

from policies.guardrails.pattern import Entity, pattern_finder

MAX_KEY_HEADER = 57  # characters of the BEGIN line
MAX_KEY_LINES = 70  # an RSA key of 4,096 bits has 51
MAX_KEY_LINE = 76
_KEY_HEADER = re2.compile(r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----")
_KEY_LINE = re2.compile(r"\s{1,2}[A-Za-z0-9+/=]{16,76}")

_WORD = r"(?i:password|passwd|passphrase|secret|api[_-]?key|access[_-]?token)"


def _find_private_key(text: str) -> Iterator[tuple[int, int]]:
    """The BEGIN line and the lines of base64 that follow it."""
    for match in _KEY_HEADER.finditer(text):
        end = match.end()
        for _ in range(MAX_KEY_LINES):
            line = _KEY_LINE.match(text[end : end + MAX_KEY_LINE + 2])
            if line is None:
                break
            end += line.end()
        yield match.start(), end


ENTITIES = (
    Entity("aws_key", r"(?:AKIA|ASIA)[0-9A-Z]{16}", pattern_finder(r"(?:AKIA|ASIA)[0-9A-Z]{16}"), 20),
    Entity("github_token", r"gh[pousr]_[A-Za-z0-9]{36}", pattern_finder(r"gh[pousr]_[A-Za-z0-9]{36,251}"), 255),
    Entity("slack_token", r"xox[abprs]-[A-Za-z0-9-]{10}", pattern_finder(r"xox[abprs]-[A-Za-z0-9-]{10,250}"), 255),
    Entity(
        "private_key",
        r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----",
        _find_private_key,
        MAX_KEY_HEADER + MAX_KEY_LINES * (MAX_KEY_LINE + 2),
    ),
    Entity(
        "jwt",
        r"eyJ[A-Za-z0-9_-]{10,400}\.eyJ",
        pattern_finder(r"eyJ[A-Za-z0-9_-]{10,400}\.eyJ[A-Za-z0-9_-]{10,900}\.[A-Za-z0-9_-]{10,700}"),
        2010,
    ),
    Entity(
        "password",
        _WORD + r"""["' ]{0,3}[:=]["' ]{0,3}[^\s"']{8}""",
        pattern_finder(_WORD + r"""["' ]{0,3}[:=]["' ]{0,3}[^\s"']{8,128}"""),
        160,
    ),
)
