"""Personal data by shape and checksum: email, phone, IBAN, payment card, US social security number.

A shape alone is not enough: a card passes Luhn, an IBAN mod 97, a phone number its country's plan, an SSN its ranges.
Source: RFC 5321 4.5.3.1 (lengths of an address); ISO 13616 (IBAN); ISO/IEC 7812 (cards); `python-stdnum`,
`phonenumbers`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import phonenumbers
import re2
from phonenumbers import COUNTRY_CODE_TO_REGION_CODE, PhoneMetadata
from stdnum import iban, luhn
from stdnum.us import ssn

from policies.guardrails.pattern import Entity, occurrences

MAX_LOCAL_PART = 64  # RFC 5321
MAX_DOMAIN = 255
MAX_CARD = 19
CARD_DIGITS = range(13, MAX_CARD + 1)
MAX_IBAN = 34
MIN_IBAN = 15
_DOUBLED = (0, 2, 4, 6, 8, 1, 3, 5, 7, 9)  # twice the digit, its own digits added

_LOCAL = re2.compile(r"[\pL\pN._%+'!#$*~-]+$")
_DOMAIN = re2.compile(r"[\pL\pN-][\pL\pN.-]*")
_DIGITS = re2.compile(r"[0-9]+")
_IBAN_START = re2.compile(r"[A-Za-z]{2}[0-9]{2}")  # cannot overlap itself: every place is found
_IBAN = re2.compile(r"[A-Za-z]{2}[0-9]{2}(?:[ -]?[A-Za-z0-9]){11,30}")
_SSN = re2.compile(r"[0-9]{3}[ -][0-9]{2}[ -][0-9]{4}")
_PHONE_START = re2.compile(r"[+(]?[0-9]+")
_INTERNATIONAL = re2.compile(r"\+[0-9](?:[ ().-]{0,2}[0-9]){6,14}")
_NORTH_AMERICAN = re2.compile(r"[(]?[0-9]{3}[)]?[ .-]{1,2}[0-9]{3}[ .-][0-9]{4}")
_LONGEST_PHONE = 2 + 14 * 3


def _find_email(text: str) -> Iterator[tuple[int, int]]:
    for at in occurrences(text, "@"):
        local = _LOCAL.search(text[max(0, at - MAX_LOCAL_PART) : at])
        domain = _DOMAIN.match(text[at + 1 : at + 1 + MAX_DOMAIN])
        if local is None or domain is None:
            continue
        labels = domain.group().split("..")[0].rstrip(".-")
        if "." in labels:
            yield at - len(local.group()), at + 1 + len(labels)


def _find_card(text: str) -> Iterator[tuple[int, int]]:
    """A card is one or more groups of digits, a blank or a dash apart, that together pass Luhn."""
    groups = [match.span() for match in _DIGITS.finditer(text)]
    for first, (start, _) in enumerate(groups):
        end = _card_end(text, groups[first : first + MAX_CARD]) if text[start] in "23456" else None
        if end is not None:
            yield start, end


def _card_end(text: str, groups: list[tuple[int, int]]) -> int | None:
    """Return where the longest card ends that the first groups make.

    Luhn's sum is kept for both parities while digits are added, so every length costs one step; the library confirms.
    """
    digits, end, found = "", groups[0][0], None
    sums = [0, 0]  # sums[p]: digits at positions of parity p count twice
    for begin, finish in groups:
        if digits and not (begin == end + 1 and text[end] in " -"):
            break
        if len(digits) + finish - begin > MAX_CARD:
            break
        for digit in text[begin:finish]:
            parity, value = len(digits) % 2, int(digit)
            sums[parity] += _DOUBLED[value]
            sums[1 - parity] += value
            digits += digit
        end = finish
        if len(digits) in CARD_DIGITS and sums[len(digits) % 2] % 10 == 0 and luhn.is_valid(digits):
            found = end
    return found


def _find_iban(text: str) -> Iterator[tuple[int, int]]:
    for opening in _IBAN_START.finditer(text):
        start = opening.start()
        match = _IBAN.match(text[start : start + 2 * MAX_IBAN])
        length = None if match is None else _iban_length(match.group())
        if length is not None:
            yield start, start + length


def _iban_length(run: str) -> int | None:
    """Return the characters of the longest IBAN at the start of `run`. The library confirms what mod 97 lets pass."""
    head = run[:4].upper()
    closing = int(head[0], 36) * 10**4 + int(head[1], 36) * 10**2 + int(head[2:])  # moved behind, as ISO 7064 has it
    remainder, count, found = 0, 4, None
    for position, character in enumerate(run[4:], start=4):
        if character in " -":
            continue
        value = int(character, 36)
        remainder = (remainder * (10 if value < 10 else 100) + value) % 97
        count += 1
        if count >= MIN_IBAN and (remainder * 10**6 + closing) % 97 == 1:
            end = position + 1
            found = end if iban.is_valid(run[:end].replace("-", " ")) else found
    return found


def _find_ssn(text: str) -> Iterator[tuple[int, int]]:
    for match in _SSN.finditer(text):
        start, end = match.span()
        if _stands_alone(text, start, end) and ssn.is_valid(match.group().replace(" ", "-")):
            yield start, end


def _stands_alone(text: str, start: int, end: int) -> bool:
    return not (start > 0 and text[start - 1].isalnum()) and not (end < len(text) and text[end].isalnum())


def _find_phone(text: str) -> Iterator[tuple[int, int]]:
    for opening in _PHONE_START.finditer(text):
        start = opening.start()
        for begin in (start, start + 1) if text[start] == "(" else (start,):
            if begin > 0 and text[begin - 1].isdigit():
                continue
            slice_ = text[begin : begin + _LONGEST_PHONE + 1]
            length = _international_length(slice_) if text[begin] == "+" else _north_american_length(slice_)
            if length is not None:
                yield begin, begin + length
                break


def _international_length(slice_: str) -> int | None:
    """Return the characters of the longest valid number; it ends where a group of digits does."""
    match = _INTERNATIONAL.match(slice_)
    run = "" if match is None else match.group()
    for end in range(len(run), 7, -1):
        stops = end == len(slice_) or not slice_[end].isdigit()
        if stops and run[end - 1].isdigit() and _has_length(run[:end]) and _is_phone(run[:end], None):
            return end
    return None


def _north_american_length(slice_: str) -> int | None:
    match = _NORTH_AMERICAN.match(slice_)
    if match is None or slice_[match.end() : match.end() + 1].isdigit():
        return None
    return match.end() if _is_phone(match.group(), "US") else None


def _has_length(number: str) -> bool:
    """Say quickly whether a country has numbers that long; a trunk zero in brackets is one more."""
    digits = "".join(character for character in number if character.isdigit())
    lengths = ((len(digits) - size, _national_lengths(int(digits[:size]))) for size in (1, 2, 3))
    return any(rest in known or rest - 1 in known for rest, known in lengths)


@lru_cache(maxsize=1000)
def _national_lengths(code: int) -> frozenset[int]:
    found: set[int] = set()
    for region in COUNTRY_CODE_TO_REGION_CODE.get(code, ()):
        nongeographic = region == "001"
        metadata = (
            PhoneMetadata.metadata_for_nongeo_region(code)
            if nongeographic
            else PhoneMetadata.metadata_for_region(region)
        )
        found.update(_possible_lengths(metadata))
    return frozenset(found)


def _possible_lengths(metadata: PhoneMetadata | None) -> tuple[int, ...]:
    description = None if metadata is None else metadata.general_desc
    return () if description is None else tuple(description.possible_length)


def _is_phone(text: str, region: str | None) -> bool:
    try:
        return bool(phonenumbers.is_valid_number(phonenumbers.parse(text, region)))
    except phonenumbers.NumberParseException:
        return False


ENTITIES = (
    Entity("card", r"[0-9](?:[ -]?[0-9]){12}", r"[0-9](?:[ -]?[0-9])*[ -]?", _find_card, MAX_CARD * 2, "0-9"),
    Entity(
        "email",
        r"@",
        r"[\pL\pN._%+'!#$*~-]+(?:@[\pL\pN.-]*)?",
        _find_email,
        MAX_LOCAL_PART + 1 + MAX_DOMAIN + 1,
        "@",
    ),
    Entity(
        "iban",
        r"[A-Za-z]{2}[0-9]{2}(?:[ -]?[A-Za-z0-9]){11}",
        r"[A-Za-z](?:[A-Za-z](?:[0-9](?:[0-9](?:[ -]?[A-Za-z0-9]){0,30}[ -]?)?)?)?",
        _find_iban,
        2 * MAX_IBAN,
        "0-9",
    ),
    Entity(
        "phone",
        r"\+[0-9]|[0-9]{3}[)]?[ .-]{1,2}[0-9]{3}[ .-][0-9]{4}",
        r"[+(0-9][ ().0-9-]{0,45}",
        _find_phone,
        _LONGEST_PHONE + 1,
        "0-9",
    ),
    Entity("ssn", r"[0-9]{3}[ -][0-9]{2}[ -][0-9]{4}", r"[0-9][ 0-9-]{0,10}", _find_ssn, 12, "0-9"),
)
