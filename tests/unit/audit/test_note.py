"""Signed notes: what is accepted, what is ignored, what is refused."""

from __future__ import annotations

import base64

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from audit.note import (
    MAX_NOTE_BYTES,
    MAX_SIGNATURES,
    NoteError,
    NoteMalformed,
    NotSigned,
    SignatureWrong,
    Signer,
    Verifier,
    VerifierMalformed,
    note_text,
    open_note,
    sign_note,
)

# A note and a key published with the format's first implementation, and a public key whose base64 holds `+`.
KNOWN_KEY = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
KNOWN_NOTE = (
    "If you think cryptography is the answer to your problem,\n"
    "then you don't know what your problem is.\n"
    "\n"
    "— PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n"
)
KEY_WITH_PLUS = "sum.golang.org+033de0ae+Ac4zctda0e5eza+HJyk9SxEdh+s3Ux18htTTAD8OuAn8"


def _signer(name: str = "probity.example/log", seed: int = 1) -> Signer:
    return Signer(name, Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32))


OURS, OTHER = _signer(), _signer("witness.example/w1", 2)
TEXT = "a text\nof two lines\n"


def test_a_note_of_another_implementation_opens() -> None:
    note = open_note(KNOWN_NOTE, [Verifier.parse(KNOWN_KEY)])
    assert note.text == KNOWN_NOTE.split("\n\n")[0] + "\n"
    assert [verifier.name for verifier in note.signed_by] == ["PeterNeumann"]


@pytest.mark.parametrize("text", [KNOWN_KEY, KEY_WITH_PLUS, str(OURS.verifier)])
def test_a_verifier_key_reads_back_as_it_was_written(text: str) -> None:
    assert str(Verifier.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "name",
        "name+c74f20a3",
        KNOWN_KEY[1:],
        KNOWN_KEY.replace("c74f20a3", "C74F20A3"),
        KNOWN_KEY.replace("c74f20a3", "c74f20a4"),
        KNOWN_KEY.replace("+ARpc", "+BRpc"),
        KNOWN_KEY[:-1],
        KNOWN_KEY[:-4],
        KNOWN_KEY + "=",
        KNOWN_KEY + "\n",
        " " + KNOWN_KEY,
        KNOWN_KEY.replace("PeterNeumann", "Peter Neumann"),
        KNOWN_KEY.replace("PeterNeumann", ""),
        KNOWN_KEY.replace("PeterNeumann", "Peter\u00a0Neumann"),
    ],
)
def test_a_text_that_is_no_verifier_key_is_refused(text: str) -> None:
    with pytest.raises(VerifierMalformed):
        Verifier.parse(text)


@pytest.mark.parametrize("name", ["", "a b", "a+b", "a\u2003b", "a\nb", "a\x7f\x1fb", "\ud800"])
def test_a_key_with_a_name_that_would_break_the_line_is_refused(name: str) -> None:
    with pytest.raises(VerifierMalformed):
        _signer(name)
    with pytest.raises(VerifierMalformed):
        Verifier(name, OURS.verifier.public_key)


def test_ours_may_be_any_of_the_signatures() -> None:
    signers = [_signer(f"witness.example/{number}", number + 10) for number in range(15)]
    for at in (0, 1, 15):
        note = sign_note(TEXT, [*signers[:at], OURS, *signers[at:]])
        assert open_note(note, [OURS.verifier]).signed_by == (OURS.verifier,)


def test_known_signers_are_named_in_the_order_of_their_lines_each_once() -> None:
    note = sign_note(TEXT, [OTHER, OURS, OURS])
    assert open_note(note, [OURS.verifier, OTHER.verifier]).signed_by == (OTHER.verifier, OURS.verifier)


def test_a_key_of_the_same_name_but_another_id_is_unknown() -> None:
    note = sign_note(TEXT, [_signer(seed=9), OURS])
    assert open_note(note, [OURS.verifier]).signed_by == (OURS.verifier,)
    with pytest.raises(NotSigned):
        open_note(sign_note(TEXT, [_signer(seed=9)]), [OURS.verifier])


def test_a_note_no_known_key_signed_is_refused() -> None:
    with pytest.raises(NotSigned):
        open_note(sign_note(TEXT, [OURS]), [OTHER.verifier])
    with pytest.raises(NotSigned):
        open_note(sign_note(TEXT, [OURS]), [])


def test_a_wrong_signature_of_a_known_key_refuses_the_whole_note() -> None:
    wrong = OTHER.line("another text\n")
    with pytest.raises(SignatureWrong):
        open_note(sign_note(TEXT, [OURS]) + wrong, [OURS.verifier, OTHER.verifier])
    # Of a key nobody asked about, the same line says nothing.
    assert open_note(sign_note(TEXT, [OURS]) + wrong, [OURS.verifier])


def test_no_changed_character_of_a_note_goes_unseen() -> None:
    note = sign_note(TEXT, [OURS])
    for at in range(len(note)):
        for other in {"a", "A", "\n", " ", "+", "=", chr(ord(note[at]) ^ 1)} - {note[at]}:
            with pytest.raises(NoteError):
                open_note(note[:at] + other + note[at + 1 :], [OURS.verifier])


def test_no_cut_off_note_is_accepted() -> None:
    note = sign_note(TEXT, [OURS])
    for at in range(len(note)):
        with pytest.raises(NoteError):
            open_note(note[:at], [OURS.verifier])
        with pytest.raises(NoteError):
            open_note(note[at + 1 :], [OURS.verifier])


@pytest.mark.parametrize("text", ["\n", "\n\n", "a\n\nb\n", "a\n\n\n\n", "— a b\n", "x\n\n— a b\n", "zażółć 😀\n"])
def test_a_text_ends_at_the_last_blank_line(text: str) -> None:
    note = sign_note(text, [OURS, OTHER])
    assert note_text(note) == text
    assert open_note(note, [OURS.verifier]).text == text


def test_text_put_before_a_signed_text_is_seen() -> None:
    note = sign_note(TEXT, [OURS])
    with pytest.raises(NoteError):
        open_note("forged\n\n" + note, [OURS.verifier])


@pytest.mark.parametrize("text", ["", "no newline", "tab\t\n", "cr\r\n", "nul\0\n", "\ud800\n"])
def test_a_text_that_cannot_be_signed_is_refused(text: str) -> None:
    with pytest.raises(NoteMalformed):
        sign_note(text, [OURS])


@pytest.mark.parametrize(
    "line",
    [
        "",
        "\n",
        "- probity.example/log AAAAAAAA\n",
        "—probity.example/log AAAAAAAA\n",
        "— probity.example/log\n",
        "— probity.example/log \n",
        "— probity.example/log  AAAAAAAA\n",
        "— probity.example/log AAAA\n",
        "— probity.example/log AAAAAA==\n",
        "— probity.example/log AAAAAAA\n",
        "— probity.example/log AAAAAAA_\n",
        "— probity.example/log AAAAAAB=\n",
        "— probity.example/log AAAAAAAA \n",
        "— probity+example AAAAAAAA\n",
        "—  AAAAAAAA\n",
        "— probity.example/log AAAAAAAA\r\n",
        "— probity.example/log AAAAAAAA",
    ],
)
def test_a_signature_line_of_another_form_refuses_the_note(line: str) -> None:
    with pytest.raises(NoteMalformed):
        open_note(sign_note(TEXT, [OURS]) + line if line.strip() else TEXT + "\n" + line, [OURS.verifier])


def test_a_signature_of_another_length_is_wrong_not_an_accident() -> None:
    for length in (1, 63, 65, 200):
        encoded = base64.b64encode(OURS.verifier.key_id + bytes(length)).decode()
        with pytest.raises(SignatureWrong):
            open_note(f"{TEXT}\n— {OURS.name} {encoded}\n", [OURS.verifier])


def test_notes_are_bounded() -> None:
    note = sign_note(TEXT, [OURS] * MAX_SIGNATURES)
    assert open_note(note, [OURS.verifier])
    with pytest.raises(NoteMalformed, match="signature lines"):
        open_note(note + OTHER.line(TEXT), [OURS.verifier])
    with pytest.raises(NoteMalformed, match="longer"):
        open_note("x" * MAX_NOTE_BYTES + "\n\n", [OURS.verifier])


def test_a_private_key_is_not_shown() -> None:
    assert OURS.private_key.private_bytes_raw().hex() not in repr(OURS)
