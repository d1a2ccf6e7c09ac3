"""Arithmetic: tensors in, tensors out. Knows nothing of requests, people or files."""
