"""Checkpoints: the golden note, the text's one form, and whose they are."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from audit.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointMalformed,
    OriginMismatch,
    open_checkpoint,
    read_checkpoint,
    sign_checkpoint,
)
from audit.merkle import EMPTY_ROOT
from audit.note import NotSigned, Signer, sign_note
from audit.trust import read_trust

GOLDEN = Path(__file__).parents[2] / "golden" / "audit"
ORIGIN = "probity.example/acme-bank"
ROOT = bytes.fromhex("5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328")
SIGNER = Signer(ORIGIN, Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
EIGHT = Checkpoint(ORIGIN, 8, ROOT)


def test_the_golden_checkpoint_opens_under_the_golden_trust_file() -> None:
    note = (GOLDEN / "checkpoint.note").read_text(encoding="utf-8")
    trust = read_trust(GOLDEN / "trust.txt")
    assert open_checkpoint(note, ORIGIN, trust.logs[ORIGIN]) == EIGHT
    assert read_checkpoint(note) == EIGHT


def test_signing_gives_the_golden_checkpoint() -> None:
    assert sign_checkpoint(EIGHT, SIGNER) == (GOLDEN / "checkpoint.note").read_text(encoding="utf-8")


def test_a_checkpoint_reads_back_as_it_was_written() -> None:
    for checkpoint in (
        EIGHT,
        Checkpoint(ORIGIN, 0, EMPTY_ROOT),
        Checkpoint("x", 2**63 - 1, bytes(32)),
        Checkpoint("name with spaces", 1, b"\xff" * 32, ("first", "second line")),
    ):
        assert Checkpoint.parse(checkpoint.text) == checkpoint


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n\n\n",
        f"{ORIGIN}\n8\n",
        EIGHT.text[:-1],
        EIGHT.text + "\n",
        "\n" + EIGHT.text,
        EIGHT.text.replace("\n8\n", "\n08\n"),
        EIGHT.text.replace("\n8\n", "\n+8\n"),
        EIGHT.text.replace("\n8\n", "\n-8\n"),
        EIGHT.text.replace("\n8\n", "\n8 \n"),
        EIGHT.text.replace("\n8\n", "\n٨\n"),
        EIGHT.text.replace("\n8\n", "\n\n"),
        EIGHT.text.replace("\n8\n", "\n9223372036854775808\n"),
        EIGHT.text.replace("\n8\n", "\n" + "9" * 5000 + "\n"),
        EIGHT.text.replace("\n8\n", "\n0\n"),
        EIGHT.text.replace("RgQyg=", "RgQyg"),
        EIGHT.text.replace("RgQyg=", "RgQyh="),
        EIGHT.text.replace("RgQyg=", "RgQyg= "),
        EIGHT.text.replace("/RgQyg=", "_RgQyg="),
        f"{ORIGIN}\n8\n\n",
        f"{ORIGIN}\n8\nAAAA\n",
        f"{ORIGIN}\n8\nWurzelzähler\n",
        EIGHT.text + "extension\n\n",
        EIGHT.text + "\nextension\n",
    ],
)
def test_a_text_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(CheckpointMalformed):
        Checkpoint.parse(text)


@pytest.mark.parametrize(
    "arguments",
    [("", 1, ROOT), ("a\nb", 1, ROOT), ("a", -1, ROOT), ("a", 2**63, ROOT), ("a", 1, ROOT[:31]), ("a", 0, ROOT)],
)
def test_a_checkpoint_that_no_log_has_is_refused(arguments: tuple[str, int, bytes]) -> None:
    with pytest.raises(CheckpointMalformed):
        Checkpoint(*arguments)
    with pytest.raises(CheckpointMalformed):
        Checkpoint("a", 1, ROOT, ("",))


def test_a_checkpoint_of_another_log_is_refused_even_if_well_signed() -> None:
    note = sign_checkpoint(Checkpoint("probity.example/other", 8, ROOT), SIGNER)
    with pytest.raises(OriginMismatch):
        open_checkpoint(note, ORIGIN, [SIGNER.verifier])


def test_while_a_key_is_rotated_both_keys_open_the_checkpoint() -> None:
    new = Signer(ORIGIN, Ed25519PrivateKey.from_private_bytes(bytes([7]) * 32))
    note = sign_checkpoint(EIGHT, SIGNER, new)
    assert open_checkpoint(note, ORIGIN, [SIGNER.verifier]) == open_checkpoint(note, ORIGIN, [new.verifier]) == EIGHT
    with pytest.raises(NotSigned):
        open_checkpoint(sign_checkpoint(EIGHT, new), ORIGIN, [SIGNER.verifier])


def test_a_signed_text_that_is_no_checkpoint_is_refused() -> None:
    with pytest.raises(CheckpointError):
        open_checkpoint(sign_note("not a checkpoint\n", [SIGNER]), ORIGIN, [SIGNER.verifier])
