"""Personal data by shape and checksum: email, phone, IBAN, payment card, US social security number.

A shape alone is not enough: a card passes Luhn, an IBAN mod 97, a phone number its country's plan, an SSN its ranges.
Source: RFC 5321 4.5.3.1 (lengths of an address); ISO 13616 (IBAN); ISO/IEC 7812 (cards); `python-stdnum`,
`phonenumbers`.
"""

from __future__ import annotations

from collections.abc import Iterator

import phonenumbers
import re2
from stdnum import iban, luhn
from stdnum.us import ssn

from policies.guardrails.pattern import Entity

MAX_LOCAL_PART = 64  # RFC 5321
MAX_DOMAIN = 255
CARD_DIGITS = range(13, 20)
MAX_IBAN = 34
_IBAN_SHORTEST = 15

_LOCAL = re2.compile(r"[A-Za-z0-9._%+'-]{1,64}$")
_DOMAIN = re2.compile(r"[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){1,8}")
_DIGITS = re2.compile(r"[0-9]+")
_IBAN_START = re2.compile(r"[A-Za-z]{2}[0-9]{2}")
_IBAN = re2.compile(r"[A-Za-z]{2}[0-9]{2}(?:[ -]?[A-Za-z0-9]){11,30}")
_SSN = re2.compile(r"[0-9]{3}[ -][0-9]{2}[ -][0-9]{4}")
_PHONE_START = re2.compile(r"\+|[(]?[0-9]{3}")
_INTERNATIONAL = re2.compile(r"\+[0-9](?:[ ().-]{0,2}[0-9]){6,14}")
_NORTH_AMERICAN = re2.compile(r"[(]?[0-9]{3}[)]?[ .-]{1,2}[0-9]{3}[ .-][0-9]{4}")


def _find_email(text: str) -> Iterator[tuple[int, int]]:
    at = text.find("@")
    while at >= 0:
        local = _LOCAL.search(text[max(0, at - MAX_LOCAL_PART) : at])
        domain = _DOMAIN.match(text[at + 1 : at + 1 + MAX_DOMAIN])
        if local is not None and domain is not None:
            yield at - (local.end() - local.start()), at + 1 + domain.end()
        at = text.find("@", at + 1)


def _find_card(text: str) -> Iterator[tuple[int, int]]:
    """A card is one or more groups of digits, a blank or a dash apart, that together pass Luhn."""
    groups = [match.span() for match in _DIGITS.finditer(text)]
    for first, (start, _) in enumerate(groups):
        end = start
        digits = ""
        best: tuple[int, int] | None = None
        for begin, finish in groups[first : first + max(CARD_DIGITS)]:
            if digits and not (begin == end + 1 and text[end] in " -"):
                break
            digits += text[begin:finish]
            end = finish
            if len(digits) > max(CARD_DIGITS):
                break
            if len(digits) in CARD_DIGITS and digits[0] in "23456" and luhn.is_valid(digits):
                best = (start, end)
        if best is not None:
            yield best


def _find_iban(text: str) -> Iterator[tuple[int, int]]:
    for start in _starts(_IBAN_START, text):
        match = _IBAN.match(text[start : start + 2 * MAX_IBAN])
        if match is None:
            continue
        run = match.group()
        ends = [position + 1 for position, character in enumerate(run) if character not in " -"]
        for end in reversed(ends[_IBAN_SHORTEST - 1 :]):
            if iban.is_valid(run[:end].replace("-", " ")):
                yield start, start + end
                break


def _find_ssn(text: str) -> Iterator[tuple[int, int]]:
    for match in _SSN.finditer(text):
        start, end = match.span()
        if _stands_alone(text, start, end) and ssn.is_valid(match.group().replace(" ", "-")):
            yield start, end


def _find_phone(text: str) -> Iterator[tuple[int, int]]:
    for start in _starts(_PHONE_START, text):
        shape, region = (_INTERNATIONAL, None) if text[start] == "+" else (_NORTH_AMERICAN, "US")
        match = shape.match(text[start : start + _LONGEST_PHONE])
        if match is None or (start > 0 and text[start - 1].isdigit()):
            continue
        end = start + match.end()
        if region is not None and end < len(text) and text[end].isdigit():
            continue
        if _is_phone(match.group(), region):
            yield start, end


def _is_phone(text: str, region: str | None) -> bool:
    try:
        return bool(phonenumbers.is_valid_number(phonenumbers.parse(text, region)))
    except phonenumbers.NumberParseException:
        return False


def _starts(pattern: object, text: str) -> Iterator[int]:
    """Yield where `pattern` matches, every overlapping place once."""
    position = 0
    while (match := pattern.search(text, position)) is not None:  # type: ignore[attr-defined]
        yield match.start()
        position = match.start() + 1


def _stands_alone(text: str, start: int, end: int) -> bool:
    return not (start > 0 and text[start - 1].isalnum()) and not (end < len(text) and text[end].isalnum())


_LONGEST_PHONE = 2 + 14 * 3

ENTITIES = (
    Entity("card", r"[0-9](?:[ -]?[0-9]){12}", _find_card, max(CARD_DIGITS) * 2),
    Entity("email", r"@[A-Za-z0-9-]{1,63}\.[A-Za-z0-9-]", _find_email, MAX_LOCAL_PART + 1 + MAX_DOMAIN + 1),
    Entity("iban", r"[A-Za-z]{2}[0-9]{2}(?:[ -]?[A-Za-z0-9]){11}", _find_iban, 2 * MAX_IBAN),
    Entity("phone", r"\+[0-9]|[0-9]{3}[)]?[ .-]{1,2}[0-9]{3}[ .-][0-9]{4}", _find_phone, _LONGEST_PHONE + 1),
    Entity("ssn", r"[0-9]{3}[ -][0-9]{2}[ -][0-9]{4}", _find_ssn, 12),
)
