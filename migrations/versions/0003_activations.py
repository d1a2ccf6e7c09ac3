"""Find the activations of policies among all leaves: they are asked for whenever a policy is read."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

IN_FORCE = "type IN ('policy.activated', 'policy.rolled_back')"


def upgrade() -> None:
    where = sa.text(IN_FORCE)
    op.create_index("leaf_in_force", "leaf", ["log", "time"], sqlite_where=where, postgresql_where=where)


def downgrade() -> None:
    op.drop_index("leaf_in_force", "leaf")
