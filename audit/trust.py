"""The trust file: whose signatures an auditor believes. Handed over once, by another way than the database.

A line a key; the key's name is the log's origin. `#` begins a comment line, blank lines are skipped:

    probity/trust/v1
    # handed over 2026-11-20, fingerprint read out on the telephone
    log probity.example/acme-bank+9813c373+AQOhB7/zzhC+HXDdGOdLwJln5NYwm6UNXx3chmQSVTG4

A log has two keys while it changes from one to the other. Knows nothing of the database.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from audit.durable import PUBLIC, replace_file
from audit.note import Verifier, VerifierMalformed

HEADER = "probity/trust/v1"
MAX_TRUST_BYTES = 1_000_000

# TrustMalformed    the only error: the file is not a trust file; `OSError` where it cannot be read


class TrustMalformed(ValueError):
    """The file is not a trust file."""


@dataclass(frozen=True, slots=True)
class Trust:
    logs: Mapping[str, tuple[Verifier, ...]]  # origin → its keys, at least one


def write_trust(path: Path, verifiers: Iterable[Verifier]) -> None:
    """Write the keys of logs; the name of each is its log's origin."""
    lines = [HEADER, *(f"log {verifier}" for verifier in verifiers)]
    replace_file(path, "".join(f"{line}\n" for line in lines).encode(), PUBLIC)


def read_trust(path: Path) -> Trust:
    """Read a trust file.

    Raises:
        TrustMalformed: a line is not of the form above; the message says which.
        OSError: the file cannot be read.
    """
    content = path.read_bytes()
    if len(content) > MAX_TRUST_BYTES:
        raise TrustMalformed(f"the trust file is longer than {MAX_TRUST_BYTES} bytes")
    try:
        lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise TrustMalformed("the trust file is not UTF-8") from error
    if lines[0] != HEADER:
        raise TrustMalformed(f"the first line of a trust file is `{HEADER}`")
    logs: dict[str, tuple[Verifier, ...]] = {}
    for number, line in enumerate(lines[1:], start=2):
        if line and not line.startswith("#"):
            verifier = _parse(number, line)
            logs[verifier.name] = (*logs.get(verifier.name, ()), verifier)
    if not logs:
        raise TrustMalformed("the trust file names no log")
    return Trust(logs)


def _parse(number: int, line: str) -> Verifier:
    kind, _, key = line.partition(" ")
    if kind != "log":
        raise TrustMalformed(f"line {number} of the trust file does not begin with `log`")
    try:
        return Verifier.parse(key)
    except VerifierMalformed as error:
        raise TrustMalformed(f"line {number} of the trust file holds no verifier key") from error
