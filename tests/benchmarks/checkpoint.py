"""Checkpoints of random weights, with a tokenizer of random words: for what depends on their shape alone."""

from __future__ import annotations

import itertools
import json
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from tests.support.tiny_models import make_tokenizer

SHAPES = ("tiny", "half-billion")
CONTEXT = 2048


def write_checkpoint(shape: str, directory: Path, **saving: Any) -> int:
    """Write a model with a tokenizer; return its parameters. `saving` goes to `save_pretrained` (shard size, …)."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = _config(shape)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(directory, **saving)
    make_word_tokenizer(config.vocab_size).save_pretrained(directory)
    return sum(parameter.numel() for parameter in model.parameters())


def _config(shape: str) -> Any:
    from transformers import LlamaConfig, Qwen2Config

    common: dict[str, Any] = {"max_position_embeddings": CONTEXT, "tie_word_embeddings": True, "eos_token_id": 2}
    if shape == "tiny":
        return LlamaConfig(
            **common,
            vocab_size=8192,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
        )
    return Qwen2Config(
        **common,
        vocab_size=32_768,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
    )


def make_word_tokenizer(vocabulary: int) -> Any:
    """Return a tokenizer of which almost every token is a word with its blank: so each token of an answer is seen.

    By merges alone, since some servers read nothing else of a family's tokenizer.
    """
    from transformers import PreTrainedTokenizerFast

    fast = make_tokenizer()
    model = json.loads(fast.backend_tokenizer.to_str())
    tokens, merges = model["model"]["vocab"], _merges_of_words(vocabulary - len(fast))
    for pair in merges:
        tokens.setdefault("".join(pair), len(tokens))
    model["model"]["merges"] = merges + model["model"]["merges"]  # the first in the list is done first
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(model)),
        eos_token=fast.eos_token,
        pad_token=fast.pad_token,
        model_max_length=CONTEXT,
        chat_template=fast.chat_template,
    )


def _merges_of_words(tokens: int) -> list[list[str]]:
    """Return merges that make so many tokens at most, as many of them words as possible."""
    letters = string.ascii_lowercase
    ends = [[one, other] for one, other in itertools.product(letters, repeat=2)]
    starts: list[list[str]] = []  # of a blank with one letter, then of these with a second
    made: list[list[str]] = []
    for word in words():
        new = [start for start in (["Ġ", word[0]], ["Ġ" + word[0], word[1]]) if start not in starts]
        if len(ends) + len(starts) + len(new) + len(made) + 1 > tokens:
            break
        starts += new
        made.append(["Ġ" + word[:2], word[2:]])
    return [*sorted(starts, key=lambda pair: len(pair[0])), *ends, *made]


def words() -> Iterator[str]:
    """Yield made-up words of four letters, each of which is a token where the vocabulary is large enough."""
    return ("".join(letters) for letters in itertools.product(string.ascii_lowercase, repeat=4))
