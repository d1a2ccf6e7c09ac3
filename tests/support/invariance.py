"""For tests of invariance: prompts, neighbours, and the bits by which two answers are compared."""

from __future__ import annotations

import struct

from engine.request import GenerationRequest
from tests.support.engine_core import Output, make_request
from tests.support.tiny_models import VOCABULARY


def prompt(length: int, start: int = 5, vocabulary: int = VOCABULARY) -> list[int]:
    """Return tokens; of one `start`, the shorter text begins the longer one."""
    return [3 + (start + 31 * index * index) % (vocabulary - 3) for index in range(length)]


def sampled(length: int, tokens: int, name: str = "", vocabulary: int = VOCABULARY) -> GenerationRequest:
    """Return a request, called by its length if by nothing else, for so many tokens sampled by every rule at once."""
    return make_request(
        name or str(length),
        prompt(length, vocabulary=vocabulary),
        tokens,
        seed=length,
        temperature=0.9,
        top_k=50,
        top_p=0.95,
        min_p=0.01,
        logit_bias=((3, -1.5), (40, 2.0)),
        repetition_penalty=1.2,
        frequency_penalty=0.4,
        presence_penalty=-0.3,
        stop_tokens=(3,),
        min_tokens=tokens,
        top_logprobs=20,
        ignore_eos=True,
    )


def others(count: int) -> list[GenerationRequest]:
    """Return requests of many lengths, to stand beside the one that is looked at."""
    return [
        make_request(f"other-{index}", prompt(1 + 37 * index % 150, index), 1 + 5 * index % 20, seed=index)
        for index in range(count)
    ]


def bits(output: Output) -> tuple[object, ...]:
    """Return tokens, log-probabilities with the best beside them as bytes, and the replay digest."""
    assert output.stats is not None
    entries = [
        (entry.token, entry.logprob, *(number for pair in entry.top for number in pair)) for entry in output.logprobs
    ]
    packed = [struct.pack(f"<{len(entry)}d", *entry) for entry in entries]
    return tuple(output.tokens), packed, output.stats.replay_digest
