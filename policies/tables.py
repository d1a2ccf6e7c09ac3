"""The tables of policies. They lie in the log's database, so that a change and its record are one transaction."""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, Integer, MetaData, String, Table, Text

metadata = MetaData()

# Every version of a tenant's document that was ever accepted; never changed. The floor is tenant `*`.
policy_version = Table(
    "policy_version",
    metadata,
    Column("tenant", String(63), primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),  # 1, 2, 3, … per tenant
    Column("document", Text, nullable=False),  # canonical JSON
    Column("digest", String(71), nullable=False),  # of the document alone, `sha256:<64 hex>`
    Column("author", String(64), nullable=False),  # pseudonym
    Column("reason", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),  # microseconds since 1970 UTC
)

# One row a tenant: which version holds, and whether the tenant is served. `generation` counts changes: the ETag.
tenant_state = Table(
    "tenant_state",
    metadata,
    Column("tenant", String(63), primary_key=True),
    Column("active_version", Integer),
    Column("suspended", Boolean, nullable=False),
    Column("generation", Integer, nullable=False),
)
