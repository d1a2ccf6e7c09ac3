"""What happens when the audit log dies: the process ends, at once, and says why.

audit.md: "An fsync error ends the process; it is never retried." After a failed write nobody knows what is on the
disk, and a gateway that cannot put on record must not look alive to who routes requests to it. So nothing is drained
and nothing is closed: closing would write, and answers that wait would be told only that there is none. Their
connections are cut; what they were sent is on record.

A supervisor that restarts the process will restart it again and again while the disk fails. That is meant: each start
checks the log and the ratchet first and refuses if they do not agree, which is safer than serving from a process that
has seen its disk fail, and the loop is what an operator's alarm looks for. A writer that was fenced by another gateway
ends in the same way, and its restart helps at once.
"""

from __future__ import annotations

import logging
import os
import re
import threading

EXIT_STATUS = 1  # failed
NOTE_TIMEOUT_S = 1.0  # for the last line: whoever should read it may have stopped reading

_diagnostics = logging.getLogger("probity.audit")


def end_process(why: str) -> None:
    """Note why, and end. `why` is a constant text of the log's, with no content in it. Never returns."""
    note = threading.Thread(target=_note, args=(why,), daemon=True)
    note.start()
    note.join(NOTE_TIMEOUT_S)
    os._exit(EXIT_STATUS)


def _note(why: str) -> None:
    _diagnostics.critical("audit_log_dead", extra={"reason": re.sub(r"[^A-Za-z0-9]+", "_", why)})
