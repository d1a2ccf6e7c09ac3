"""The log: evidence with its defences, the journal, and what can be rebuilt from the evidence.

Append-only is enforced by the database. SQLite: triggers against UPDATE, DELETE and (because INSERT OR REPLACE skips
delete triggers) against inserting what is there, by any of its keys; DROP is stopped by the gateway's authorizer.

PostgreSQL: row and TRUNCATE triggers, ENABLE ALWAYS; an event trigger against DDL outside of a migration; and rights:

    audit_owner    owns the tables, logs in for migrations only
    audit_writer   the gateways: INSERT and SELECT on evidence
    audit_reader   officers' tools: SELECT

A superuser runs this step, because an event trigger needs one. The roles are made where they are missing, without
login: `GRANT audit_writer TO gateway` gives a login its part.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

EVIDENCE = {
    "leaf": ("log", "writer", "writer_seq"),
    "leaf_number": ("log", "leaf_index"),
    "tile": ("log", "level", "tile_index"),
    "checkpoint": ("log", "tree_size"),
    "content": ("record_id", "part"),
}
MUTABLE = ("journal", "writer", "chain", "head", "request_index")
CLOSING = "('request.completed', 'request.failed', 'request.interrupted')"
# Every other way by which REPLACE would find a row to delete; SQLite's own `rowid` is one more, for every table.
OTHER_KEYS = {
    "leaf": (
        "record_id = NEW.record_id",
        f"request_id = NEW.request_id AND type IN {CLOSING} AND NEW.type IN {CLOSING}",
    ),
    "leaf_number": ("log = NEW.log AND writer = NEW.writer AND writer_seq = NEW.writer_seq",),
}

ROLES = ("audit_owner", "audit_writer", "audit_reader")
FUNCTIONS = ("probity_append_only", "probity_dense_index", "probity_dense_seq", "probity_no_ddl")
# What would take a defence away. An event trigger does not fire for commands on event triggers: those take a superuser.
FORBIDDEN_TAGS = (
    "ALTER FUNCTION", "ALTER ROUTINE", "ALTER RULE", "ALTER SCHEMA", "ALTER TABLE", "ALTER TRIGGER", "CREATE FUNCTION",
    "CREATE RULE", "CREATE TRIGGER", "DROP FUNCTION", "DROP INDEX", "DROP OWNED", "DROP ROUTINE", "DROP RULE",
    "DROP SCHEMA", "DROP TABLE", "DROP TRIGGER", "GRANT", "REVOKE",
)  # fmt: skip


def upgrade() -> None:
    _create_tables()
    if op.get_bind().dialect.name == "sqlite":
        _defend_sqlite()
    else:
        _defend_postgresql()


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP EVENT TRIGGER IF EXISTS probity_no_ddl")
    for table in (*MUTABLE, *EVIDENCE):
        op.drop_table(table)
    if op.get_bind().dialect.name == "postgresql":
        for function in FUNCTIONS:
            op.execute(f"DROP FUNCTION IF EXISTS {function}()")


def _defend_sqlite() -> None:
    for table, key in EVIDENCE.items():
        for verb in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
                f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
            )
        same = " AND ".join(f"{column} = NEW.{column}" for column in key)
        found = " OR ".join(
            f"EXISTS (SELECT 1 FROM {table} WHERE {where})"  # noqa: S608 - names are ours, above
            for where in (same, "rowid = NEW.rowid", *OTHER_KEYS.get(table, ()))
        )
        op.execute(
            f"CREATE TRIGGER {table}_no_replace BEFORE INSERT ON {table} WHEN {found} "
            f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
        )
    op.execute(
        "CREATE TRIGGER leaf_number_is_dense BEFORE INSERT ON leaf_number WHEN NEW.leaf_index != "
        "(SELECT COALESCE(MAX(leaf_index) + 1, 0) FROM leaf_number WHERE log = NEW.log) "
        "BEGIN SELECT RAISE(ABORT, 'leaf indexes are dense'); END"
    )
    op.execute(
        "CREATE TRIGGER leaf_writer_seq_is_dense BEFORE INSERT ON leaf WHEN NEW.writer_seq != "
        "(SELECT COALESCE(MAX(writer_seq) + 1, 0) FROM leaf WHERE log = NEW.log AND writer = NEW.writer) "
        "BEGIN SELECT RAISE(ABORT, 'a writer numbers its leaves densely'); END"
    )


def _defend_postgresql() -> None:
    op.execute(
        "ALTER TABLE leaf ADD CONSTRAINT leaf_hash_is_of_bytes CHECK (leaf_hash = sha256('\\x00'::bytea || bytes))"
    )
    _make_functions(op.get_bind().execute(sa.text("SELECT quote_ident(current_schema())")).scalar_one())
    for table in EVIDENCE:
        _always(table, f"{table}_append_only", "BEFORE UPDATE OR DELETE", "FOR EACH ROW", "probity_append_only")
        _always(table, f"{table}_no_truncate", "BEFORE TRUNCATE", "FOR EACH STATEMENT", "probity_append_only")
    _always("leaf_number", "leaf_number_is_dense", "BEFORE INSERT", "FOR EACH ROW", "probity_dense_index")
    _always("leaf", "leaf_writer_seq_is_dense", "BEFORE INSERT", "FOR EACH ROW", "probity_dense_seq")
    _give_rights()
    tags = ", ".join(f"'{tag}'" for tag in FORBIDDEN_TAGS)
    op.execute(
        f"CREATE EVENT TRIGGER probity_no_ddl ON ddl_command_start WHEN TAG IN ({tags}) "
        "EXECUTE FUNCTION probity_no_ddl()"
    )
    op.execute("ALTER EVENT TRIGGER probity_no_ddl ENABLE ALWAYS")


def _make_functions(schema: str) -> None:
    """Tables are named with their schema: a temporary table of the same name would be found first, and be empty."""
    op.execute(
        "CREATE FUNCTION probity_append_only() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION '% is append-only', TG_TABLE_NAME USING ERRCODE = 'insufficient_privilege'; END $$"
    )
    op.execute(  # the schema's name is quoted by the server
        "CREATE FUNCTION probity_dense_index() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "  # noqa: S608
        "IF NEW.leaf_index <> (SELECT COALESCE(MAX(leaf_index) + 1, 0) FROM " + schema + ".leaf_number "
        "WHERE log = NEW.log) THEN "
        "RAISE EXCEPTION 'leaf indexes are dense' USING ERRCODE = 'check_violation'; END IF; RETURN NEW; END $$"
    )
    op.execute(  # the schema's name is quoted by the server
        "CREATE FUNCTION probity_dense_seq() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "  # noqa: S608
        "IF NEW.writer_seq <> (SELECT COALESCE(MAX(writer_seq) + 1, 0) FROM " + schema + ".leaf "
        "WHERE log = NEW.log AND writer = NEW.writer) THEN "
        "RAISE EXCEPTION 'a writer numbers its leaves densely' USING ERRCODE = 'check_violation'; END IF; "
        "RETURN NEW; END $$"
    )
    op.execute(
        "CREATE FUNCTION probity_no_ddl() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN "
        "IF current_setting('probity.migration', true) IS DISTINCT FROM 'on' THEN "
        "RAISE EXCEPTION '% is refused in the database of the log', TG_TAG "
        "USING ERRCODE = 'insufficient_privilege'; END IF; END $$"
    )


def _give_rights() -> None:
    for role in ROLES:
        op.execute(
            f"DO $$ BEGIN IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = '{role}') THEN "
            f"CREATE ROLE {role} NOLOGIN; END IF; END $$"
        )
    op.execute("DO $$ BEGIN EXECUTE format('REVOKE CREATE ON SCHEMA %I FROM PUBLIC', current_schema()); END $$")
    for table in (*EVIDENCE, *MUTABLE):
        op.execute(f"ALTER TABLE {table} OWNER TO audit_owner")
        op.execute(f"REVOKE ALL ON {table} FROM PUBLIC, audit_writer, audit_reader")
        op.execute(f"GRANT SELECT ON {table} TO audit_reader")
        op.execute(f"GRANT SELECT, INSERT ON {table} TO audit_writer")
    for table in EVIDENCE:
        op.execute(f"REVOKE UPDATE, DELETE, TRUNCATE ON {table} FROM audit_owner")
    for table in MUTABLE:
        op.execute(f"GRANT UPDATE ON {table} TO audit_writer")
    op.execute("GRANT DELETE ON journal TO audit_writer")
    op.execute("GRANT SELECT ON alembic_version TO audit_writer, audit_reader")  # to see that nothing is to be done


def _always(table: str, trigger: str, when: str, level: str, function: str) -> None:
    op.execute(f"CREATE TRIGGER {trigger} {when} ON {table} {level} EXECUTE FUNCTION {function}()")
    op.execute(f"ALTER TABLE {table} ENABLE ALWAYS TRIGGER {trigger}")


def _create_tables() -> None:
    # ### commands auto generated by Alembic - please adjust! ###
    op.create_table(
        "chain",
        sa.Column("log", sa.String(length=255), nullable=False),
        sa.Column("writer", sa.String(length=32), nullable=False),
        sa.Column("appended", sa.BigInteger(), nullable=False),
        sa.Column("numbered", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("log", "writer"),
    )
    op.create_table(
        "checkpoint",
        sa.Column("log", sa.String(length=255), nullable=False),
        sa.Column("tree_size", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("root", sa.LargeBinary(), nullable=False),
        sa.Column("note", sa.String(), nullable=False),
        sa.Column("time", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("log", "tree_size"),
    )
    op.create_table(
        "content",
        sa.Column("record_id", sa.String(length=36), nullable=False),
        sa.Column("part", sa.String(length=64), nullable=False),
        sa.Column("log", sa.String(length=255), nullable=False),
        sa.Column("key_id", sa.String(length=64), nullable=False),
        sa.Column("nonce", sa.LargeBinary(), nullable=False),
        sa.Column("ciphertext", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("record_id", "part"),
    )
    op.create_table(
        "head",
        sa.Column("log", sa.String(length=255), nullable=False),
        sa.Column("tenant", sa.String(length=128), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("frontier", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("log"),
    )
    op.create_table(
        "journal",
        sa.Column("request_id", sa.String(length=36), nullable=False),
        sa.Column("sequence", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("choice", sa.Integer(), nullable=False),
        sa.Column("sealed", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("request_id", "sequence"),
    )
    op.create_table(
        "leaf",
        sa.Column("log", sa.String(length=255), nullable=False),
        sa.Column("writer", sa.String(length=32), nullable=False),
        sa.Column("writer_seq", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("leaf_hash", sa.LargeBinary(), nullable=False),
        sa.Column("bytes", sa.LargeBinary(), nullable=False),
        sa.Column("record_id", sa.String(length=36), nullable=False),
        sa.Column("request_id", sa.String(length=36), nullable=True),
        sa.Column("type", sa.String(length=40), nullable=False),
        sa.Column("time", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("length(leaf_hash) = 32", name="leaf_hash_has_32_bytes"),
        sa.CheckConstraint("writer_seq >= 0", name="leaf_writer_seq_is_a_count"),
        sa.PrimaryKeyConstraint("log", "writer", "writer_seq"),
    )
    op.create_index(
        "leaf_closes_once",
        "leaf",
        ["request_id"],
        unique=True,
        sqlite_where=sa.text("type IN ('request.completed', 'request.failed', 'request.interrupted')"),
        postgresql_where=sa.text("type IN ('request.completed', 'request.failed', 'request.interrupted')"),
    )
    op.create_index("leaf_record", "leaf", ["record_id"], unique=True)
    op.create_index("leaf_request", "leaf", ["request_id"], unique=False)
    op.create_table(
        "leaf_number",
        sa.Column("log", sa.String(length=255), nullable=False),
        sa.Column("leaf_index", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("writer", sa.String(length=32), nullable=False),
        sa.Column("writer_seq", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("log", "leaf_index"),
        sa.UniqueConstraint("log", "writer", "writer_seq", name="leaf_is_numbered_once"),
    )
    op.create_table(
        "request_index",
        sa.Column("request_id", sa.String(length=36), nullable=False),
        sa.Column("log", sa.String(length=255), nullable=False),
        sa.Column("tenant", sa.String(length=128), nullable=False),
        sa.Column("writer", sa.String(length=32), nullable=False),
        sa.Column("key_id", sa.String(length=64), nullable=False),
        sa.Column("subject", sa.String(length=64), nullable=True),
        sa.Column("client", sa.String(length=256), nullable=True),
        sa.Column("purpose", sa.String(length=128), nullable=True),
        sa.Column("action", sa.String(length=40), nullable=False),
        sa.Column("model_alias", sa.String(length=128), nullable=True),
        sa.Column("model_version", sa.String(length=80), nullable=True),
        sa.Column("effect", sa.String(length=8), nullable=False),
        sa.Column("policy", sa.String(length=80), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("code", sa.String(length=64), nullable=True),
        sa.Column("guardrails", sa.String(), nullable=False),
        sa.Column("received_at", sa.BigInteger(), nullable=False),
        sa.Column("completed_at", sa.BigInteger(), nullable=True),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=True),
        sa.Column("completion_tokens", sa.BigInteger(), nullable=True),
        sa.Column("reserved_tokens", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("request_id"),
    )
    op.create_index("request_index_by_tenant", "request_index", ["tenant", "received_at", "request_id"], unique=False)
    op.create_index("request_index_by_time", "request_index", ["received_at", "request_id"], unique=False)
    op.create_index(
        "request_index_open",
        "request_index",
        ["writer"],
        unique=False,
        sqlite_where=sa.text("status = 'received'"),
        postgresql_where=sa.text("status = 'received'"),
    )
    op.create_table(
        "tile",
        sa.Column("log", sa.String(length=255), nullable=False),
        sa.Column("level", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("tile_index", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("hashes", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("log", "level", "tile_index"),
    )
    op.create_table(
        "writer",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("started", sa.BigInteger(), nullable=False),
        sa.Column("lease_until", sa.BigInteger(), nullable=False),
        sa.Column("ended", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
