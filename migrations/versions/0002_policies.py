"""Policies: their versions, which holds, and whether a tenant is served."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "policy_version",
        sa.Column("tenant", sa.String(63), primary_key=True),
        sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("document", sa.Text, nullable=False),
        sa.Column("digest", sa.String(71), nullable=False),
        sa.Column("author", sa.String(64), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "tenant_state",
        sa.Column("tenant", sa.String(63), primary_key=True),
        sa.Column("active_version", sa.Integer),
        sa.Column("suspended", sa.Boolean, nullable=False),
        sa.Column("generation", sa.Integer, nullable=False),
    )
    if op.get_bind().dialect.name == "postgresql":
        _give_rights()


def _give_rights() -> None:
    """The roles of 0001: a stored version never changes, what holds does."""
    for table in ("policy_version", "tenant_state"):
        op.execute(f"ALTER TABLE {table} OWNER TO audit_owner")
        op.execute(f"REVOKE ALL ON {table} FROM PUBLIC, audit_writer, audit_reader")
        op.execute(f"GRANT SELECT ON {table} TO audit_reader")
        op.execute(f"GRANT SELECT, INSERT ON {table} TO audit_writer")
    op.execute("GRANT UPDATE ON tenant_state TO audit_writer")


def downgrade() -> None:
    op.drop_table("tenant_state")
    op.drop_table("policy_version")
