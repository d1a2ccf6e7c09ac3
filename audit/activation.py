"""Which policy the log says is in force: what the last activation record of a tenant names.

The text of a policy lies in a table that can be edited, its digest beside it; the record of its activation cannot.

    {"actor":{…},"digest":"sha256:9f…","effective":"sha256:0c…","generation":4,"name":"acme-bank-prod",
     "tenant":"acme-bank","version":2}

`generation` counts the changes of a tenant's state, so it orders activations whatever the clocks of several gateways
say. Knows rows and leaves, no policy.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from sqlalchemy import Connection, inspect, select, text

from audit.canonical import LeafError, leaf_hash
from audit.leaf import Leaf
from audit.records import SYSTEM, RecordType
from audit.tables import IN_FORCE, head, leaf, leaf_number

FLOOR = "*"  # the tenant that the organisation's floor is filed under; its records are the platform's
_DOCUMENT = text("SELECT document FROM policy_version WHERE tenant = :tenant AND version = :version")
_ACTIVE = text("SELECT active_version FROM tenant_state WHERE tenant = :tenant")
_OF_POLICIES = (
    select(leaf.c.bytes, leaf_number.c.leaf_index)
    .outerjoin(
        leaf_number,
        (leaf.c.log == leaf_number.c.log)
        & (leaf.c.writer == leaf_number.c.writer)
        & (leaf.c.writer_seq == leaf_number.c.writer_seq),
    )
    .where(text("type IN ('policy.drafted', 'policy.activated', 'policy.rolled_back')"))
    .order_by(leaf_number.c.leaf_index)
)
RECENT = 64  # activations, newest by their writers' clocks, among which the last one is


@dataclass(frozen=True, slots=True)
class Activation:
    version: int
    digest: str  # `sha256:<64 hex>` of the document's canonical text
    generation: int


def activation_of(said: Leaf) -> Activation | None:
    """Return what a leaf says was activated; None where it does not say it in full."""
    version, digest, generation = (said.body.get(name) for name in ("version", "digest", "generation"))
    if not isinstance(version, int) or not isinstance(digest, str) or not isinstance(generation, int):
        return None
    return Activation(version, digest, generation)


def last_activation(connection: Connection, log: str, tenant: str) -> Activation | None:
    """Return the last activation of `tenant` on record in `log`; None where there is none that is whole."""
    rows = connection.execute(
        select(leaf.c.bytes, leaf.c.leaf_hash)
        .where(leaf.c.log == log, text(IN_FORCE))
        .order_by(leaf.c.time.desc())
        .limit(RECENT)
    ).all()
    said = [_leaf(bytes(row.bytes), bytes(row.leaf_hash)) for row in rows]
    found = [activation_of(one) for one in said if one is not None and one.body.get("tenant") == tenant]
    return max((one for one in found if one is not None), key=lambda one: one.generation, default=None)


def wrong_policy(connection: Connection, log: str) -> tuple[str, int | None] | None:
    """Return the first policy of a log's tenant that is not what its leaves say, and the leaf's index where it has one.

    Every version that was drafted or activated is there with the text that was recorded, and what holds is what was
    activated last. The tables are the policies' own; a database that lacks them has none to check.
    """
    if not all(inspect(connection).has_table(name) for name in ("policy_version", "tenant_state")):
        return None
    last: Activation | None = None
    tenant = connection.execute(select(head.c.tenant).where(head.c.log == log)).scalar_one_or_none()
    if tenant is None:
        return None
    tenant = FLOOR if tenant == SYSTEM else tenant
    for row in connection.execute(_OF_POLICIES.where(leaf.c.log == log)):
        said = Leaf.parse(bytes(row.bytes))
        change = activation_of(said)
        if change is None or said.body.get("tenant") != tenant:
            continue
        if _stored_digest(connection, tenant, change.version) != change.digest:
            what = "drafted" if said.type is RecordType.POLICY_DRAFTED else "activated"
            return f"version {change.version} of the policy of `{tenant}` is not what was {what}", row.leaf_index
        if said.type is not RecordType.POLICY_DRAFTED and (last is None or last.generation < change.generation):
            last = change
    active = connection.execute(_ACTIVE, {"tenant": tenant}).scalar_one_or_none()
    if active is not None and (last is None or last.version != active):
        return f"the policy of `{tenant}` that holds, version {active}, is not the one activated last", None
    return None


def _stored_digest(connection: Connection, tenant: str, version: int) -> str | None:
    stored = connection.execute(_DOCUMENT, {"tenant": tenant, "version": version}).scalar_one_or_none()
    return None if stored is None else "sha256:" + hashlib.sha256(str(stored).encode()).hexdigest()


def _leaf(stored: bytes, hashed: bytes) -> Leaf | None:
    try:
        return Leaf.parse(stored) if leaf_hash(stored) == hashed else None
    except LeafError:
        return None
