"""Are these the keys that the log was written with? Asked at the start, before anything is written with them.

Every file of a key may be whole and another's: content would be sealed that the right key cannot open, people would get
other pseudonyms, and checkpoints would be signed that no auditor believes. So the newest of what each key made is held
against it: the last signed checkpoints, and the last record that names somebody.

Knows no content: what it opens, it compares and forgets.
"""

from __future__ import annotations

import json

from sqlalchemy import Connection, Row, select

from audit.checkpoint import open_checkpoint
from audit.content import ContentError, SealedPart, open_part
from audit.keys import Keyring, KeysOfAnother
from audit.keystore import KeyNotHeld, KeyStore
from audit.leaf import Leaf
from audit.note import NoteError
from audit.ratchet import Ratchet
from audit.tables import content, head, leaf

PART = "identities"  # whose leaf holds a pseudonym of each of its members


def check_keys(connection: Connection, keyring: Keyring, keystore: KeyStore, ratchet: Ratchet) -> None:
    """Raise KeyRefused unless what was made with each key fits it. What was erased cannot be asked."""
    _check_signing(keyring, ratchet)
    newest = select(content, leaf.c.bytes, head.c.tenant).where(content.c.part == PART)
    joined = newest.join(leaf, leaf.c.record_id == content.c.record_id).join(head, head.c.log == content.c.log)
    row = connection.execute(joined.order_by(content.c.record_id.desc()).limit(1)).one_or_none()
    if row is not None:
        _check_naming(row, keyring, keystore)


def _check_signing(keyring: Keyring, ratchet: Ratchet) -> None:
    for origin in ratchet.origins:
        try:
            open_checkpoint(ratchet.note(origin) or "", origin, [keyring.verifier(origin)])
        except NoteError as error:
            raise KeysOfAnother("signing", "did not sign the checkpoints of the ratchet") from error


def _check_naming(row: Row[tuple[object, ...]], keyring: Keyring, keystore: KeyStore) -> None:
    """Hold the key that wraps and the key that names against one record that both had a part in."""
    try:
        wrapped = keystore.get(row.key_id).wrapped
    except KeyNotHeld:
        return
    data_key = keyring.encryption.unwrap(row.tenant, wrapped)
    named = Leaf.parse(bytes(row.bytes))
    committed = next(part for part in named.parts if part.name == PART)
    sealed = SealedPart(bytes.fromhex(committed.com), bytes.fromhex(committed.ct), row.nonce, row.ciphertext)
    try:
        opened = open_part(data_key, row.tenant, row.record_id, PART, sealed)
    except ContentError:
        return  # damaged: verify says so, and names it
    for kind, value in json.loads(opened.plaintext).items():
        if named.identities[kind] != keyring.pseudonym(row.tenant, kind, value):
            raise KeysOfAnother("pseudonym", "did not make the pseudonyms of this log")
