"""What guessing tokens by prompt lookup brings, and costs, on the demonstration model.

    python -m tests.benchmarks.bench_guessing

Questions as an application asks them, which repeat little, and texts that repeat themselves, at several numbers of
sequences and of rows up to which a step may hold guesses. The bits are the same in every cell. Asserts nothing.
"""

from __future__ import annotations

import time

import torch

from engine.core import EngineCore
from engine.model_loading import load_model
from engine.model_runner import ModelRunner
from engine.models.model import Model
from engine.reading import Reading
from engine.request import GenerationRequest, SamplingParams
from engine.tokenizer import IncrementalDetokenizer, Tokenizer
from gateway.demo import model_directory
from tests.benchmarks.machine import describe_machine
from tests.support.engine_core import make_limits

BUDGET = 512
TRIAL_ROWS = (0, 8, 16, 32)
SEQUENCES = (1, 4, 8, 16, 32)
REPEATS = 3
QUESTIONS = (
    "Summarise this complaint: I was charged twice for one card payment of 40 euros, and nobody answers my calls.",
    "What does a current account cost?",
    "When is the cut-off time for transfers?",
    "Which documents do I need for the appointment?",
)
REPEATING = "A card costs two euros. An account costs five euros. A transfer is free. "


def main() -> None:
    torch.set_num_threads(2)
    print(f"{describe_machine()}; torch {torch.__version__}, 2 threads")
    directory = model_directory()
    tokenizer = Tokenizer(Reading(directory))
    decoder = load_model(Reading(directory), BUDGET).model
    chats = [tokenizer.render_chat([{"role": "user", "content": text}]) for text in QUESTIONS]
    questions = [tuple(tokenizer.encode(chat, chat=True)) for chat in chats]
    repeating = [tuple(tokenizer.encode(REPEATING * 4, chat=False))]
    for name, prompts, most in (("questions", questions, 80), ("repeating texts", repeating, 120)):
        print(f"\n{name}: output tokens/s (tokens a step and sequence), by rows up to which a step holds guesses")
        print("at once " + "".join(f"{rows:>16}" for rows in TRIAL_ROWS))
        for count in SEQUENCES:
            cells = [best(decoder, tokenizer, prompts, count, rows, most) for rows in TRIAL_ROWS]
            print(f"{count:>7} " + "".join(f"{rate:>9.0f} ({width:.2f})" for rate, width in cells))


def best(
    decoder: Model, tokenizer: Tokenizer, prompts: list[tuple[int, ...]], count: int, rows: int, most: int
) -> tuple[float, float]:
    return max(measure(decoder, tokenizer, prompts, count, rows, most) for _ in range(REPEATS))


def measure(
    decoder: Model, tokenizer: Tokenizer, prompts: list[tuple[int, ...]], count: int, rows: int, most: int
) -> tuple[float, float]:
    """Return output tokens a second, and tokens a sequence had of a step that gave it some."""
    config = decoder.config
    limits = make_limits(
        vocabulary_size=config.vocab_size,
        context_length=config.max_position_embeddings,
        token_budget=BUDGET,
        chunk_tokens=BUDGET,
        trial_rows=rows,
    )
    core = EngineCore(
        ModelRunner(decoder, 4096),
        limits,
        eos_ids=tokenizer.eos_ids,
        detokenizer_for=lambda sampling: IncrementalDetokenizer(tokenizer, sampling.stop),
    )
    for index in range(count):
        sampling = SamplingParams(max_tokens=most, seed=index, temperature=0.0)
        prompt = prompts[index % len(prompts)]
        core.add(GenerationRequest(str(index), prompt, sampling, b"%d" % index, "key"))
    tokens = given = 0
    began = time.perf_counter()
    while core.has_work:
        emissions = core.step()
        given += len(emissions)
        tokens += sum(len(emission.delta.tokens) for emission in emissions)
    return tokens / (time.perf_counter() - began), tokens / given


if __name__ == "__main__":
    main()
