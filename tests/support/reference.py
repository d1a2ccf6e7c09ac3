"""A model as `transformers` computes it: float32 arithmetic on the same weights is the reference, and what it loses in
bfloat16 itself is the yardstick."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Reference:
    exact: Any  # float32
    rounded: Any  # bfloat16

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        batch = torch.tensor([tokens])
        return self.exact(batch).logits[0], self.rounded(batch).logits[0].float()

    @torch.inference_mode()
    def generate(self, prompt: list[int], count: int) -> list[int]:
        """Greedy, in float32: `eos_token_id` is taken away so that as many tokens come as are asked for."""
        batch = torch.tensor([prompt])
        output = self.exact.generate(
            batch, attention_mask=torch.ones_like(batch), max_new_tokens=count, do_sample=False, eos_token_id=None
        )
        return list(output[0, len(prompt) :].tolist())


@cache
def load_reference(directory: Path, **options: str) -> Reference:
    """`options` go to `from_pretrained`."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    load = AutoModelForCausalLM.from_pretrained
    return Reference(*(load(directory, dtype=kind, **options).eval() for kind in (torch.float32, torch.bfloat16)))
