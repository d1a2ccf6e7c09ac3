"""Fixtures that every room's tests may ask for live in tests/support."""

pytest_plugins = [
    "tests.support.postgres",
    "tests.support.audit_log",
    "tests.support.tiny_models",
    "tests.support.tiny_families",
]
