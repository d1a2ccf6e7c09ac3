"""Detectors: what each must find, what it must leave, and that no text can stall one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import SupportsIndex

import pytest
import re2

from policies.decision import Action
from policies.guardrails import inspect_input
from policies.guardrails.detectors import DETECTORS, longest_span
from policies.guardrails.fold import fold
from policies.guardrails.pattern import Finder
from policies.guardrails.secrets import MAX_JWT_CLAIMS, MAX_KEY_BODY
from tests.support.guardrails import CARDS, IBANS, KEY_BODY, SECRETS, input_spec


def redacted(text: str, detector: str = "pii") -> str:
    return inspect_input(text, [input_spec("g", detector, Action.REDACT)]).text


@pytest.mark.parametrize("card", [*CARDS, "4111-1111-1111-1111", "2223 0031 2200 3222", "3530111333300000"])
def test_cards_are_found_in_groups_and_without(card: str) -> None:
    assert redacted(f"pay with {card}, please") == "pay with [CARD], please"


@pytest.mark.parametrize("number", ["4111 1111 1111 1112", "1234567890123456", "411111111111", "4111-1111"])
def test_numbers_that_fail_the_checksum_are_no_cards(number: str) -> None:
    assert "[CARD]" not in redacted(f"order {number}")


def test_a_card_is_found_behind_and_before_other_numbers() -> None:
    assert redacted(f"17 {CARDS[0]} 12/27 123") == "17 [CARD] 12/27 123"


@pytest.mark.parametrize("iban", [*IBANS, IBANS[0].lower(), "DE89-3704-0044-0532-0130-00"])
def test_ibans_are_found_as_they_are_written(iban: str) -> None:
    assert redacted(f"to {iban} today") == "to [IBAN] today"


@pytest.mark.parametrize("iban", ["GB82 WEST 1234 5698 7654 33", "XX89370400440532013000", "DE8937040044053201300"])
def test_wrong_ibans_are_none(iban: str) -> None:
    assert "[IBAN]" not in redacted(iban)


@pytest.mark.parametrize(
    "email",
    [
        "mia@example.com",
        "m.i+a_%x@sub.example.co.uk",
        "rené@example.com",
        "user@münchen.de",
        "a@b.c",
        "A" * 64 + "@x.org",
    ],
)
def test_addresses_are_found_in_all_scripts(email: str) -> None:
    assert redacted(f"<{email}>.") == "<[EMAIL]>."


@pytest.mark.parametrize("text", ["meet @ noon", "a@b", "@handle.x", "me@.com", "price@"])
def test_what_only_looks_like_an_address_is_none(text: str) -> None:
    assert redacted(text) == text


@pytest.mark.parametrize(
    "phone", ["+49 30 901820", "+1 415 555 2671", "+442079460958", "(415) 555-2671", "415-555-2671", "+49 (0)30 901820"]
)
def test_phone_numbers_are_found(phone: str) -> None:
    assert redacted(f"call {phone} or 100 others") == "call [PHONE] or 100 others"


@pytest.mark.parametrize("text", ["+1 23", "000-000-0000", "2026-11-20 10:00", "12415-555-26715", "1 + 415 = 416"])
def test_what_no_country_dials_is_no_phone_number(text: str) -> None:
    assert redacted(text) == text


@pytest.mark.parametrize("ssn", ["219-09-9998", "219 09 9998"])
def test_social_security_numbers_are_found(ssn: str) -> None:
    assert redacted(f"ssn:{ssn}.") == "ssn:[SSN]."


@pytest.mark.parametrize(
    "text", ["000-12-3456", "666-12-3456", "900-12-3456", "219-00-9998", "1219-09-9998", "219-09-99981"]
)
def test_numbers_out_of_range_are_none(text: str) -> None:
    assert redacted(text) == text


@pytest.mark.parametrize("secret", SECRETS)
def test_each_secret_is_found_whole(secret: str) -> None:
    told = redacted(f"use {secret} for it", "secrets")
    assert told.startswith("use [")
    assert told.endswith("] for it")


@pytest.mark.parametrize(
    "key",
    [
        "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES,00\n\n"
        f"{KEY_BODY}\nAA==\n-----END RSA PRIVATE KEY-----",
        f"-----BEGIN PRIVATE KEY-----\\n{KEY_BODY}\\nAA==\\n-----END PRIVATE KEY-----",
        f"-----BEGIN OPENSSH PRIVATE KEY-----\r\n{KEY_BODY * 40}\r\n-----END OPENSSH PRIVATE KEY-----",
        f"-----BEGIN PGP PRIVATE KEY BLOCK-----\n\n{KEY_BODY}\n-----END PGP PRIVATE KEY BLOCK-----",
        f"-----BEGIN EC PRIVATE KEY-----\n{KEY_BODY}",
    ],
)
def test_private_keys_are_found_however_their_lines_are_broken(key: str) -> None:
    assert redacted(f"a: {key}", "secrets") == "a: [PRIVATE_KEY]"


@pytest.mark.parametrize("length", [10, 2_000, MAX_JWT_CLAIMS - 10])
@pytest.mark.parametrize("signature", ["", "." + "s" * 43, "." + "s" * 683])
def test_jwts_are_found_up_to_their_bounds(length: int, signature: str) -> None:
    jwt = "eyJhbGciOiJub25lIn0.eyJ" + "a" * length + signature
    assert redacted(f"Bearer {jwt} x", "secrets") == "Bearer [JWT] x"


@pytest.mark.parametrize(
    "text",
    [
        "password: required",
        "Your password: everything you typed",
        "The secret: patience and practice",
        "token: 12345678",
        "max_tokens=100000000",
        "password:<|im_end|>",
        "reset your password at https://bank.example/reset",
        "eyJ.eyJ",
        "-----BEGIN CERTIFICATE-----",
        "AKIA",
        "pwd: Example",
    ],
)
def test_sentences_about_secrets_are_none(text: str) -> None:
    assert redacted(text, "secrets") == text


@pytest.mark.parametrize(
    "text",
    [
        "password: hunter2-now",
        "API_KEY='a8f5f167f44f4964'",
        "aws_secret_access_key = wJalrXUtnFEMI/K7MDENG",
        "db_password=>Tr0ub4dor&3",
    ],
)
def test_assigned_values_that_look_drawn_are_secrets(text: str) -> None:
    assert "[PASSWORD]" in redacted(text, "secrets")


HIDDEN = {
    "full-width": "４１１１ １１１１ １１１１ １１１１",
    "mathematical": "𝟒𝟏𝟏𝟏𝟏𝟏𝟏𝟏𝟏𝟏𝟏𝟏𝟏𝟏𝟏𝟏",
    "Arabic-Indic": "٤١١١١١١١١١١١١١١١",
    "zero-width": "4\u200b1\u200b1\u200c1\u200d1111\u2060 1111\ufeff1111",
    "soft hyphen": "4111\u00ad1111\u00ad1111\u00ad1111",
    "keycaps": "".join(f"{digit}\ufe0f\u20e3" for digit in "4111111111111111"),
    "control": "4111\x001111\x0811111111",
    "dashes": "4111–1111—1111−1111",
    "no-break space": "4111\u00a01111\u202f1111\u30001111",
    "filler": "4111\u31641111\u115f11111111",
    "circled": "④①①①①①①①①①①①①①①①",
}


@pytest.mark.parametrize("way", HIDDEN)
def test_hidden_digits_are_digits(way: str) -> None:
    told = redacted(f"é {HIDDEN[way]} ü")
    assert fold(told).text == "é [CARD] ü"  # a mark behind the last digit may stay; it shows nothing


def test_folding_leaves_other_text_as_it_is() -> None:
    text = "Grüße, 漢字, l'été — ½ und \t\n"
    assert redacted(text) == text
    assert fold("plain\ttext\n").origins is None


def test_half_a_character_stalls_no_detector() -> None:
    assert redacted(f"\ud800 {CARDS[0]}") == "\ud800 [CARD]"


class _Counted(str):
    """A text that counts the characters it gives away: RE2's binding encodes what it is given, slices are copied."""

    given = 0

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        self.given += len(self)
        return super().encode(encoding, errors)

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        part = super().__getitem__(key)
        self.given += len(part)
        return part


def _work(find: Finder, text: str) -> int:
    counted = _Counted(text)
    list(find(counted))
    return counted.given


UNITS = (
    *("AB12", "123 ", "2 ", "+1234567 ", "+1 2 3 4 5 6 7 8 ", "eyJ", "password=a", "a@", "@a.a", "xoxb-", "AKIA"),
    *("555-12-3456 ", "-----BEGIN PRIVATE KEY-----", "eyJaaaaaaaaaa.eyJ", "(415) ", "GB82 WEST "),
)


@pytest.mark.parametrize("unit", UNITS)
def test_the_work_grows_with_the_text_and_not_faster(unit: str) -> None:
    """Counted, not timed. Twice the text, from where the longest finding fits: at most twice the work and a little."""
    size = 12_000 // len(unit)
    for detector in DETECTORS.values():
        for entity in detector.known:
            assert _work(entity.find, unit * 2 * size) <= 2.5 * _work(entity.find, unit * size) + entity.longest


def test_the_count_of_work_notices_a_search_that_starts_over() -> None:
    pattern = re2.compile("ab")

    def starts_over(text: str) -> Iterator[tuple[int, int]]:
        at = 0
        while (match := pattern.search(text, at)) is not None:
            yield match.span()
            at = match.end()

    assert _work(starts_over, "ab" * 200) > 3.5 * _work(starts_over, "ab" * 100)


@pytest.mark.parametrize("name", sorted(DETECTORS))
def test_the_longest_span_is_the_longest_of_the_entities_chosen(name: str) -> None:
    known = DETECTORS[name].known
    assert longest_span(name, ()) == max(entity.longest for entity in known)
    for entity in known:
        assert longest_span(name, (entity.name,)) == entity.longest
    assert MAX_KEY_BODY < (longest_span("secrets", ()) or 0) < 65_536
