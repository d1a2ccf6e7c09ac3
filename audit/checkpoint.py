"""A checkpoint: the size and root of a log's tree at one moment, as a note the log signs.

The text is the origin, the number of leaves and the root, a line each:

    probity.example/acme-bank
    8
    XcnaeacGWamtVZy3Ad7ZoqudgjqtL0lgz+Nw7/RgQyg=

We write no extension lines and keep those we read: they are signed, so they belong to the text.
Knows nothing of leaves or of where checkpoints are kept. Source: C2SP tlog-checkpoint (c2sp.org/tlog-checkpoint).
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable
from dataclasses import dataclass

from audit.merkle import EMPTY_ROOT, HASH_BYTES, MAX_TREE_SIZE
from audit.note import Signer, Verifier, note_text, open_note, sign_note

# CheckpointError           catch this, and NoteError for the signature
# ├── CheckpointMalformed   the text is not a checkpoint
# └── OriginMismatch        a checkpoint of another log


class CheckpointError(ValueError):
    """A checkpoint is refused."""


class CheckpointMalformed(CheckpointError):
    """The text is not a checkpoint."""


class OriginMismatch(CheckpointError):
    """The checkpoint is another log's."""


_SIZE = re.compile(r"0|[1-9][0-9]{0,18}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    origin: str  # the log's name, one line
    size: int  # leaves, 0 … 2**63 − 1
    root: bytes  # 32 bytes
    extensions: tuple[str, ...] = ()  # further lines, none of them empty

    def __post_init__(self) -> None:
        lines = (self.origin, *self.extensions)
        if not all(lines) or any("\n" in line for line in lines):
            raise CheckpointMalformed("the origin and each extension of a checkpoint is one line that is not empty")
        if not 0 <= self.size <= MAX_TREE_SIZE or len(self.root) != HASH_BYTES:
            raise CheckpointMalformed("a checkpoint has a size below 2**63 and a root of 32 bytes")
        if self.size == 0 and self.root != EMPTY_ROOT:
            raise CheckpointMalformed("the root of an empty log is the hash of nothing")

    @property
    def text(self) -> str:
        """Return what is signed; ends in a newline."""
        lines = (self.origin, str(self.size), base64.b64encode(self.root).decode("ascii"), *self.extensions)
        return "".join(f"{line}\n" for line in lines)

    @classmethod
    def parse(cls, text: str) -> Checkpoint:
        """Read what `text` gives.

        Raises:
            CheckpointMalformed: it is not that.
        """
        lines = text.split("\n")
        if len(lines) < 4 or lines[-1] != "":
            raise CheckpointMalformed("a checkpoint has at least three lines, each ended by a newline")
        origin, size, root, *extensions = lines[:-1]
        if not _SIZE.fullmatch(size):
            raise CheckpointMalformed("the size of a checkpoint is a decimal number without leading zeros")
        checkpoint = cls(origin, int(size), _decode(root), tuple(extensions))
        if checkpoint.text != text:
            raise CheckpointMalformed("the root of a checkpoint is standard base64")
        return checkpoint


def sign_checkpoint(checkpoint: Checkpoint, *signers: Signer) -> str:
    """Return the signed note. Two signers stand on it while the log changes its key."""
    return sign_note(checkpoint.text, signers)


def read_checkpoint(note: str) -> Checkpoint:
    """Return what a note claims, its signatures unchecked: for notes from a place that is trusted in itself.

    Raises:
        NoteMalformed, CheckpointMalformed: not a signed checkpoint.
    """
    return Checkpoint.parse(note_text(note))


def open_checkpoint(note: str, origin: str, verifiers: Iterable[Verifier]) -> Checkpoint:
    """Return the checkpoint of the log `origin` that one of its `verifiers` signed.

    Raises:
        NoteError: not a note, or not signed by them.
        CheckpointMalformed: the text is not a checkpoint.
        OriginMismatch: it is another log's.
    """
    checkpoint = Checkpoint.parse(open_note(note, verifiers).text)
    if checkpoint.origin != origin:
        raise OriginMismatch(f"the checkpoint is not one of `{origin}`")
    return checkpoint


def _decode(root: str) -> bytes:
    try:
        return base64.b64decode(root, validate=True)
    except (binascii.Error, ValueError) as error:
        raise CheckpointMalformed("the root of a checkpoint is standard base64") from error
