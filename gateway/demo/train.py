"""Makes the demonstration model: tokenizer and weights, from the dialogues and a seed.

    python -m gateway.demo.train --out gateway/demo/model

A byte-level BPE of 1,024 tokens and a Llama of under three million parameters; a plain loop with Muon on the matrices
and AdamW on the rest, loss on answers only. Positions start at a random offset, so that an answer does not depend on
where it begins.

Source: Jordan et al., 2024 (Muon): a third of the steps that AdamW took here to the same loss.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gateway.demo.dialogues import Dialogue, training_dialogue

VOCABULARY = 1_024
CONTEXT = 1_024
BATCHES_DRAWN = 8  # at a time, to sort by length
SPECIAL = ("<|end_of_text|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IGNORED = -100  # label of a token that is not learnt
PEAK = 4e-3  # learning rate
WARMUP = 60  # steps
SAID_EVERY = 50  # steps


def make_tokenizer(rng: random.Random) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(name, special=True) for name in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = [text for _ in range(20_000) for text in _texts(training_dialogue(rng))]
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|end_of_text|>", model_max_length=CONTEXT
    )
    fast.chat_template = TEMPLATE
    return fast


def _texts(dialogue: Dialogue) -> list[str]:
    return [*(message["content"] for message in dialogue.messages), dialogue.answer, "assistant", "user", "system"]


def make_model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=3,
            head_dim=32,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            rope_theta=10_000.0,
            bos_token_id=None,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def encode(tokenizer: PreTrainedTokenizerFast, dialogue: Dialogue) -> tuple[list[int], int]:
    """Return the tokens of a dialogue with its answer, and where the answer begins."""
    prompt = tokenizer.apply_chat_template(list(dialogue.messages), tokenize=False, add_generation_prompt=True)
    head = tokenizer.encode(prompt, add_special_tokens=False)
    return head + tokenizer.encode(dialogue.answer + "<|im_end|>", add_special_tokens=False), len(head)


def batches(
    tokenizer: PreTrainedTokenizerFast, steps: int, size: int, rng: random.Random
) -> Iterator[Sequence[tuple[list[int], int]]]:
    """Yield `steps` batches of dialogues of like length: padding is work for nothing."""
    waiting: list[Sequence[tuple[list[int], int]]] = []
    for _ in range(steps):
        if not waiting:
            drawn = [encode(tokenizer, training_dialogue(rng)) for _ in range(size * BATCHES_DRAWN)]
            drawn.sort(key=lambda encoded: len(encoded[0]))
            waiting = [drawn[at : at + size] for at in range(0, len(drawn), size)]
            rng.shuffle(waiting)
        yield waiting.pop()


def batch(encoded: Sequence[tuple[list[int], int]], rng: random.Random) -> dict[str, torch.Tensor]:
    """Return right-padded tensors [B, T]."""
    width = max(len(tokens) for tokens, _ in encoded)
    tokens = torch.zeros(len(encoded), width, dtype=torch.long)
    labels = torch.full((len(encoded), width), IGNORED)
    for row, (ids, start) in enumerate(encoded):
        tokens[row, : len(ids)] = torch.tensor(ids)
        labels[row, start : len(ids)] = torch.tensor(ids[start:])
    offsets = torch.tensor([rng.choice((0, rng.randrange(CONTEXT - width))) for _ in encoded])
    return {"input_ids": tokens, "labels": labels, "position_ids": offsets[:, None] + torch.arange(width)}


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=PEAK, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=PEAK, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def learning_rate(step: int, steps: int) -> float:
    """Return the rate of a step: up over the first WARMUP, level to the middle, then down to nothing."""
    return PEAK * min(1.0, (step + 1) / WARMUP) * min(1.0, 2 * (1 - step / steps))


def train(model: Any, tokenizer: PreTrainedTokenizerFast, steps: int, size: int, rng: random.Random) -> None:
    optimizers, start, total = make_optimizers(model), time.monotonic(), 0.0
    model.train()
    for step, encoded in enumerate(batches(tokenizer, steps, size, rng)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch(encoded, rng)).loss
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps)
            optimizer.step()
        total += loss.item()
        if (step + 1) % SAID_EVERY == 0:
            said = f"step {step + 1} loss {total / SAID_EVERY:.4f} after {time.monotonic() - start:.0f} s"
            print(said, flush=True)
            total = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3_800)
    parser.add_argument("--batch", type=int, default=32, help="dialogues a step")
    parser.add_argument("--seed", type=int, default=20261120)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    rng = random.Random(arguments.seed)
    tokenizer = make_tokenizer(random.Random(arguments.seed + 1))
    model = make_model()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    train(model, tokenizer, arguments.steps, arguments.batch, rng)
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    GenerationConfig(eos_token_id=2, pad_token_id=0).save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
