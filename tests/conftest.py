"""Fixtures that every room's tests may ask for live in tests/support. No test is timed: a machine may take its time."""

try:
    from hypothesis import settings
except ImportError:  # a GPU machine has it not, and tests/gpu does not need it
    pass
else:
    settings.register_profile("untimed", deadline=None)
    settings.load_profile("untimed")

pytest_plugins = [
    "tests.support.postgres",
    "tests.support.audit_log",
    "tests.support.tiny_models",
    "tests.support.tiny_families",
]
