"""Credentials, and what their roles permit. Knows no policy, no engine and no log."""
