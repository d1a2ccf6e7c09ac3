"""The tables: one alembic history for SQLite and PostgreSQL."""
