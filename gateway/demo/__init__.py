"""The demonstration: a small model of our own, and a walk through the gateway with it.

The model answers for a bank's and a clinic's support desk and says "I don't know" to the rest. It shows how Probity
works, not what a language model can do; a real one is served from its local Hugging Face directory (`model.path`).
It was made by `python -m gateway.demo.train` from the dialogues that dialogues.py writes, and nothing else.
"""

from __future__ import annotations

from pathlib import Path


def model_directory() -> Path:
    """Return the directory of the bundled model, in the Hugging Face layout."""
    return Path(__file__).parent / "model"
