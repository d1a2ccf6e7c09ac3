"""Secrets by their published shapes: cloud and forge keys, private keys, JWTs, and passwords that are assigned.

A word such as `password:` before a value is not enough: the value must look drawn, not said (`_looks_drawn`), or every
sentence about passwords would be one.

Source: the issuers' documentation of their key formats; RFC 7468 (PEM); RFC 7519 (JWT).
"""

from __future__ import annotations

from collections.abc import Iterator

import re2

from policies.guardrails.pattern import Entity, Finder, beginning, occurrences

# --- tokens: a literal, then characters of one set ---


def _token(name: str, literals: tuple[str, ...], characters: str, least: int, most: int) -> Entity:
    """Make an entity; what is longer than `most` is found up to there."""
    longest = max(map(len, literals)) + most
    trigger = f"(?:{'|'.join(literals)}){characters}{{{least}}}"
    unsettled = "|".join(f"{beginning(literal)}|{literal}{characters}{{0,{most}}}" for literal in literals)
    return Entity(name, trigger, unsettled, _token_finder(literals, characters, least, most), longest)


def _token_finder(literals: tuple[str, ...], characters: str, least: int, most: int) -> Finder:
    run = re2.compile(f"{characters}+")

    def find(text: str) -> Iterator[tuple[int, int]]:
        for literal in literals:
            for start in occurrences(text, literal):
                body = start + len(literal)
                match = run.match(text[body : body + most])
                if match is not None and match.end() >= least:
                    yield start, body + match.end()

    return find


_TOKENS = (
    _token("aws_key", ("AKIA", "ASIA"), "[0-9A-Z]", 16, 16),
    _token("github_token", ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"), "[A-Za-z0-9_]", 36, 244),
    _token("gitlab_token", ("glpat-",), "[A-Za-z0-9_-]", 20, 200),
    _token("google_key", ("AIza",), "[A-Za-z0-9_-]", 35, 35),
    _token("slack_token", ("xoxa-", "xoxb-", "xoxp-", "xoxr-", "xoxs-"), "[A-Za-z0-9-]", 10, 250),
    _token("stripe_key", ("sk_live_", "rk_live_"), "[A-Za-z0-9]", 16, 240),
)

# --- private keys ---

MAX_KEY_MARKER = 64  # characters of the BEGIN or the END line
MAX_KEY_HEADERS = 3 * 112  # of an encrypted key
MAX_KEY_BODY = 5_400  # an RSA key of 4,096 bits has 3,300
_BEGIN = "-----BEGIN "
_KEY_BEGIN = re2.compile(r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY(?: BLOCK)?-----")
_KEY_HEADERS = re2.compile(r"(?:\s{1,2}[A-Z][A-Za-z-]{2,20}: [^\n]{0,80}){0,3}")
_KEY_BODY = re2.compile(r"(?:[A-Za-z0-9+/=\s]|\\[rn])*")  # line breaks as such, or as in JSON
_KEY_END = re2.compile(r"-----END [A-Z ]{0,30}PRIVATE KEY(?: BLOCK)?-----")


def _find_private_key(text: str) -> Iterator[tuple[int, int]]:
    """From the BEGIN line through all that can be base64, and the END line if it is there."""
    for begin in _KEY_BEGIN.finditer(text):
        end = begin.end()
        end += _matched(_KEY_HEADERS, text[end : end + MAX_KEY_HEADERS])
        end += _matched(_KEY_BODY, text[end : end + MAX_KEY_BODY])
        end += _matched(_KEY_END, text[end : end + MAX_KEY_MARKER])
        yield begin.start(), end


def _matched(pattern: object, text: str) -> int:
    match = pattern.match(text)  # type: ignore[attr-defined]
    return 0 if match is None else int(match.end())


# --- JWTs ---

MAX_JWT_HEADER = 512
MAX_JWT_CLAIMS = 4_096
MAX_JWT_SIGNATURE = 1_024
_MIN_SEGMENT = 10
_BASE64URL = re2.compile(r"[A-Za-z0-9_-]+")


def _find_jwt(text: str) -> Iterator[tuple[int, int]]:
    """Two objects in base64url (`eyJ` is `{"`), and a signature if there is one."""
    for start in occurrences(text, "eyJ"):
        header = start + _matched(_BASE64URL, text[start : start + MAX_JWT_HEADER])
        if header - start < _MIN_SEGMENT or text[header : header + 4] != ".eyJ":
            continue
        claims = header + 1 + _matched(_BASE64URL, text[header + 1 : header + 1 + MAX_JWT_CLAIMS])
        if claims - header <= _MIN_SEGMENT:
            continue
        signed = text[claims : claims + 1] == "."
        signature = _matched(_BASE64URL, text[claims + 1 : claims + 1 + MAX_JWT_SIGNATURE]) if signed else 0
        yield start, claims + 1 + signature if signature else claims


# --- passwords ---

MIN_PASSWORD = 8
MAX_PASSWORD = 128
_MAX_ASSIGNMENT = 12 + 24 + 3 + 2 + 3
_WORD = r"(?i:password|passwd|passphrase|pwd|secret|token|api[_-]?key|access[_-]?key|credential)"
_KEY_WORDS = [f"{first}{between}key" for first in ("api", "access") for between in ("", "_", "-")]
_WORD_BEGINNINGS = "|".join(
    beginning(word) for word in ("password", "passphrase", "pwd", "secret", "token", "credential", *_KEY_WORDS)
)
_WORD_REST = r"""[A-Za-z0-9_-]{0,24}["'` ]{0,3}"""
_ASSIGNS = r"""(?:=>|:=|=|:)["'` ]{0,3}"""
_ASSIGNED = re2.compile(_WORD + _WORD_REST + _ASSIGNS)
_VALUE = re2.compile(r"""[^\s"'`]+""")
_SYMBOLS = frozenset("!@#$%^&*+=?~")


def _find_password(text: str) -> Iterator[tuple[int, int]]:
    for assigned in _ASSIGNED.finditer(text):
        end = assigned.end()
        value = _VALUE.match(text[end : end + MAX_PASSWORD])
        if value is not None and _looks_drawn(value.group()):
            yield assigned.start(), end + len(value.group())


def _looks_drawn(value: str) -> bool:
    """Say whether a value looks like a key rather than a word: long, varied, and more than letters in lower case."""
    core = value.rstrip(".,;:!?)]}>")
    if len(core) < MIN_PASSWORD or len(set(core)) < 5 or not any(map(str.isalpha, core)):
        return False
    return any(c.isdigit() or c in _SYMBOLS for c in core) or (any(map(str.isupper, core[1:])) and not core.isupper())


ENTITIES = (
    *_TOKENS,
    Entity(
        "private_key",
        r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY",
        f"{beginning(_BEGIN)}|{_BEGIN}(?s:.)*",  # until the longest key is past
        _find_private_key,
        MAX_KEY_MARKER + MAX_KEY_HEADERS + MAX_KEY_BODY + MAX_KEY_MARKER,
    ),
    Entity(
        "jwt",
        r"\.eyJ",
        r"e|ey|eyJ[A-Za-z0-9_.-]*",
        _find_jwt,
        MAX_JWT_HEADER + 1 + MAX_JWT_CLAIMS + 1 + MAX_JWT_SIGNATURE,
    ),
    Entity(
        "password",
        _WORD + _WORD_REST + r"[:=]",
        rf"(?i:{_WORD_BEGINNINGS})|{_WORD}{_WORD_REST}(?:{_ASSIGNS}[^\s\"'`]{{0,{MAX_PASSWORD}}})?",
        _find_password,
        _MAX_ASSIGNMENT + MAX_PASSWORD,
    ),
)
