"""The engine: token ids in, token ids out, every bit repeatable. Knows no people, no HTTP, no database."""
