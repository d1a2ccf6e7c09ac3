"""Policies: a typed document and a pure decision. Knows no HTTP, no engine, no log."""
