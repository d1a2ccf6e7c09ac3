"""How often the demonstration model is right on held-out paraphrases: wordings that training never saw.

    python -m tests.benchmarks.bench_demo_model [--each 100]

Greedy answers of our own engine, compared to the letter with the dialogue's answer: facts and explanations whole,
summaries and JSON with every slot. Prints the share by group and over all questions, and the first wrong answers.
"""

from __future__ import annotations

import argparse
import asyncio
from collections import Counter
from pathlib import Path

from engine.config import EngineConfig
from engine.load import load_engine
from engine.request import Engine, GenerationRequest, SamplingParams
from gateway.demo import model_directory
from gateway.demo.dialogues import Dialogue, held_out_dialogues
from tests.benchmarks.machine import describe_machine

SEED = 7
SHOWN = 10  # wrong answers


async def answer(engine: Engine, number: int, dialogue: Dialogue) -> str:
    prompt = engine.encode(engine.render_chat(dialogue.messages), chat=True)
    sampling = SamplingParams(max_tokens=256, seed=0, temperature=0)
    request = GenerationRequest(str(number), tuple(prompt), sampling, b"benchmark", "benchmark")
    return "".join([delta.text async for delta in engine.generate(request)])


async def measure(engine: Engine, each: int) -> None:
    dialogues = list(held_out_dialogues(SEED, each))
    answers: list[str] = []
    for begin in range(0, len(dialogues), 32):
        batch = dialogues[begin : begin + 32]
        answers += await asyncio.gather(*(answer(engine, begin + i, one) for i, one in enumerate(batch)))
    asked, right = Counter[str](), Counter[str]()
    wrong: list[tuple[Dialogue, str]] = []
    for dialogue, given in zip(dialogues, answers, strict=True):
        asked[dialogue.group] += 1
        right[dialogue.group] += given == dialogue.answer
        if given != dialogue.answer:
            wrong.append((dialogue, given))
    for group, count in asked.items():
        print(f"{group:>18}: {right[group]:>4} of {count:>4} right, {right[group] / count:6.1%}")
    print(f"{'all':>18}: {right.total():>4} of {asked.total():>4} right, {right.total() / asked.total():6.1%}")
    for dialogue, given in wrong[:SHOWN]:
        print(f"  wrong: {dialogue.messages[-1]['content']!r} -> {given!r}, not {dialogue.answer!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=model_directory())
    parser.add_argument("--each", type=int, default=100, help="questions a group")
    arguments = parser.parse_args()
    print(describe_machine())
    engine = load_engine(EngineConfig(model=arguments.model))
    try:
        asyncio.run(measure(engine, arguments.each))
    finally:
        engine.close()


if __name__ == "__main__":
    main()
