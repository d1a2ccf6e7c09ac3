"""Tiny random models of every family we serve, as Hugging Face writes them to a directory: real files, small numbers.

The weights are drawn wider than at the start of a training, so that the next token depends on the tokens before it and
the best two logits are seldom close. Libraries are imported where they are used: most tests need none of them.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

VOCABULARY = 384
CONTEXT = 1024
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
SPECIAL = ("<|end_of_text|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SENTENCES = (
    "Wie viel kostet ein Konto? Zwölf Euro im Monat.",
    "The cut-off time for transfers is 16:30; later ones leave the next day.",
    "Ihr Termin ist am Dienstag um 9 Uhr. Bitte bringen Sie die Überweisung mit.",
    "naïve café – 東京 – 😀 – done",
)
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}


def _config(family: str) -> Any:
    """Return a configuration; together they use every feature: both rope kinds, tied and not, bias, head norms."""
    from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    if family == "llama":
        return LlamaConfig(**_COMMON, intermediate_size=172, rope_parameters=LLAMA3_ROPE)
    if family == "mistral":
        return MistralConfig(**_COMMON, intermediate_size=96, head_dim=32, sliding_window=None)
    if family == "wide":  # products for which the library is not invariant on a CPU with AMX
        wide = {**_COMMON, "hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 1}
        return Qwen3Config(**wide, intermediate_size=1024, head_dim=32)
    if family == "qwen2":
        return Qwen2Config(**_COMMON, intermediate_size=173, tie_word_embeddings=True)
    return Qwen3Config(**_COMMON, intermediate_size=128, head_dim=32)


def make_model(family: str, seed: int = 0) -> Any:
    """Return a `transformers` model in bfloat16 with its weights drawn from `seed`."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(_config(family)).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.data = _draw(name, tuple(parameter.shape), generator)
    return model.to(torch.bfloat16)


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    import torch

    noise = torch.randn(shape, generator=generator)
    if name.endswith("norm.weight"):
        return 1 + 0.2 * noise
    if name.endswith("bias"):
        return 0.5 * noise
    if "embed" in name:
        return 0.5 * noise
    return noise * (4.0 if "lm_head" in name else 1.3) / shape[1] ** 0.5


@cache
def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of VOCABULARY tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(name, special=True) for name in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|end_of_text|>", model_max_length=CONTEXT
    )
    fast.chat_template = TEMPLATE
    return fast


def write_model(directory: Path, family: str, seed: int = 0, **saving: Any) -> Path:
    """Write a model with its tokenizer; `saving` goes to `save_pretrained` (shard size, …)."""
    make_model(family, seed).save_pretrained(directory, **saving)
    make_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory for each family."""
    root = tmp_path_factory.mktemp("models")
    return {family: write_model(root / family, family) for family in (*FAMILIES, "wide")}
