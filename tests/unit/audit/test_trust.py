"""The trust file."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from audit.note import Signer, Verifier
from audit.trust import TrustMalformed, read_trust, write_trust

GOLDEN = Path(__file__).parents[2] / "golden" / "audit" / "trust.txt"


def _verifier(name: str, seed: int) -> Verifier:
    return Signer(name, Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32)).verifier


def test_written_keys_read_back_several_to_a_log(tmp_path: Path) -> None:
    path = tmp_path / "trust.txt"
    old, new, other = _verifier("a/log", 1), _verifier("a/log", 2), _verifier("b/log", 1)
    write_trust(path, [old, other, new])
    assert read_trust(path).logs == {"a/log": (old, new), "b/log": (other,)}
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    write_trust(path, [other])
    assert read_trust(path).logs == {"b/log": (other,)}


def test_the_golden_trust_file_is_what_is_written(tmp_path: Path) -> None:
    trust = read_trust(GOLDEN)
    write_trust(tmp_path / "trust.txt", [key for keys in trust.logs.values() for key in keys])
    assert (tmp_path / "trust.txt").read_bytes() == GOLDEN.read_bytes()


def test_comments_and_blank_lines_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "trust.txt"
    key = _verifier("a/log", 1)
    path.write_text(f"probity/trust/v1\n# a remark\n\nlog {key}\n\n")
    assert read_trust(path).logs == {"a/log": (key,)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "first line"),
        (b"probity/trust/v2\n", "first line"),
        (b"probity/trust/v1\n", "names no log"),
        (b"probity/trust/v1\n# only a remark\n", "names no log"),
        (b"probity/trust/v1\nlog\n", "line 2"),
        (b"probity/trust/v1\nlog name+00000000+AAAA\n", "line 2"),
        (b"probity/trust/v1\n\nwitness x\n", "line 3"),
        (b"probity/trust/v1\n\xff\n", "UTF-8"),
        (b"probity/trust/v1\r\n", "first line"),
        (b"x" * 1_000_001, "longer"),
    ],
)
def test_a_file_of_another_form_is_refused_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "trust.txt"
    path.write_bytes(content)
    with pytest.raises(TrustMalformed, match=message):
        read_trust(path)


def test_a_missing_file_is_the_systems_own_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_trust(tmp_path / "trust.txt")
