"""The append-only log and its proofs. Knows records, bytes, proofs and rows; nothing of ours."""
