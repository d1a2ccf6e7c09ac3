"""`python -m audit.verify DATABASE_URL --trust FILE`: the auditor's command. Needs no web framework and no torch.

    $ python -m audit.verify sqlite:///probity-data/audit.db --trust trust.txt --checkpoint kept-last-year.note
    probity.local/acme-bank: 1204 leaves of 2 writers, 2408 parts of content, signed up to leaf 1204 (37 checkpoints)
    probity.local/system: 19 leaves of 2 writers, 0 parts of content, signed up to leaf 19 (4 checkpoints)
    verified: everything that is signed is there, unchanged

What is wrong is named on standard output, a line a log with its first wrong leaf:

    WRONG probity.local/acme-bank: leaf 17: the bytes do not have the stored hash

Exit 0: verified; 1: something is wrong; 2: it could not be tried (usage, no database, an unreadable file).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from audit.checkpoint import CheckpointError
from audit.database import DatabaseRefused, reader_engine
from audit.note import NoteError
from audit.ratchet import HEADER as RATCHET_HEADER
from audit.ratchet import Ratchet, RatchetError
from audit.trust import TrustMalformed, read_trust
from audit.verification import LogReport, Report, verify

VERIFIED, WRONG, NOT_TRIED = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        trust = read_trust(options.trust)
        held = [note for path in options.checkpoint for note in _notes(path)]
        engine = reader_engine(options.database_url)
        try:
            report = verify(engine, trust, held, options.log or None)
        finally:
            engine.dispose()
    except (TrustMalformed, NoteError, CheckpointError, RatchetError, DatabaseRefused) as error:
        return _not_tried(str(error))
    except OSError as error:
        return _not_tried(f"`{error.filename}` cannot be read")
    except SQLAlchemyError as error:
        return _not_tried(f"the database does not answer, or is not an audit log ({type(error).__name__})")
    except UnicodeDecodeError:
        return _not_tried("a file given by `--checkpoint` is not UTF-8")
    print(summary(report))
    return VERIFIED if report.first_wrong is None and report.logs else WRONG


def summary(report: Report) -> str:
    """Return what a person reads: a line a log, and the verdict."""
    lines = [_line(log) for log in report.logs]
    if not report.logs:
        lines.append("nothing to verify: the database holds no log")
    elif report.first_wrong is None:
        lines.append("verified: everything that is signed is there, unchanged")
    else:
        count = sum(log.wrong is not None for log in report.logs)
        lines.append(f"not verified: {count} of {len(report.logs)} logs wrong")
    return "\n".join(lines)


def _line(log: LogReport) -> str:
    if log.wrong is not None:
        return f"WRONG {log.wrong}"
    line = (
        f"{log.log}: {log.leaves} leaves of {log.writers} writers, {log.parts} parts of content, "
        f"signed up to leaf {log.signed_size} ({log.checkpoints} checkpoints)"
    )
    if log.leaves > log.signed_size:
        line += f", {log.leaves - log.signed_size} leaves after it not signed yet"
    if log.unnumbered:
        line += f", {log.unnumbered} leaves not numbered yet"
    if log.open_requests:
        line += f", {log.open_requests} requests not closed yet"
    return line


def _notes(path: Path) -> list[str]:
    """Return the signed checkpoints of a file: one note, or a ratchet's."""
    content = path.read_text(encoding="utf-8")
    if not content.startswith(RATCHET_HEADER):
        return [content]
    ratchet = Ratchet.load(path)
    return [note for origin in ratchet.origins if (note := ratchet.note(origin)) is not None]


def _not_tried(reason: str) -> int:
    print(f"cannot verify: {reason}", file=sys.stderr)
    return NOT_TRIED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m audit.verify", description="Recompute an audit log from its rows to its signed roots."
    )
    parser.add_argument("database_url", metavar="DATABASE_URL", help="e.g. sqlite:///audit.db")
    parser.add_argument("--trust", type=Path, required=True, metavar="FILE", help="whose signatures to believe")
    parser.add_argument(
        "--checkpoint", type=Path, action="append", default=[], metavar="FILE",
        help="a signed checkpoint you kept, or a ratchet file; the log must extend it (repeatable)",
    )  # fmt: skip
    parser.add_argument(
        "--log", action="append", metavar="ORIGIN", help="verify this log only (repeatable; default: all of them)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
