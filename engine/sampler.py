"""The sampler: one row of logits, its parameters, its position and what stands before it → one token. No batch.

Order, fixed: bias → penalties (repetition, frequency, presence) → grammar, allowed and banned tokens → temperature →
top-k → top-p → min-p → Gumbel argmax, in float64 from the first that applies. Ties go to the lowest id, everywhere.
A token's noise is a counter hash of (seed, absolute position, vocabulary id): it does not depend on what was drawn
before, on neighbours, or on any generator's state, so that a replay can draw it again.

    state = mix(seed · A + mix(position · B + C))      64 bits, wrapping
    u     = ((mix(state + id · A) >> 11) + 0.5) / 2**53      in (0, 1)
    noise = −log(−log(u))                                    standard Gumbel, float64

Source: Gumbel-max trick (Maddison et al., 2014); mix is the finaliser of SplitMix64 (Steele et al., 2014); min-p
(Nguyen et al., 2024); repetition penalty (Keskar et al., 2019); frequency and presence penalties: the OpenAI API.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.plan import Draw, PastTokens
from engine.request import SamplingParams

Floats = npt.NDArray[np.float64]
Words = npt.NDArray[np.uint64]
Ids = npt.NDArray[np.intp]

FIRST_LOOK = 256  # tokens that are put in order for top-p, before more are
LOG_2 = math.log(2)
PART = 8_192  # tokens looked at together: what is made of them stays in the processor's cache
SLACK = 1e-9  # of a bound, relative, for what it was rounded by
MOST_EXPONENT = 700  # of e, in float64

ANYWHERE = Draw(0)  # nothing stands before, nothing is ruled out

_A = 0x9E3779B97F4A7C15
_B = 0xD1B54A32D192ED03
_C = 0x8CB92BA72F3D8DD7
_M = 0xBF58476D1CE4E5B9  # of mix
_N = 0x94D049BB133111EB
_MULTIPLES = np.arange(PART, dtype=np.uint64) * np.uint64(_A)


def sample(logits: npt.NDArray[np.float32], params: SamplingParams, position: int, draw: Draw = ANYWHERE) -> int:
    """Return the token for `position` (absolute, of the token to be drawn) from logits [V].

    `draw.past` is needed where `params.looks_back`. At least one token must be left that may be sampled.
    """
    scores = adjust(logits, params, draw)
    if params.temperature == 0:
        return int(np.argmax(scores))
    scores = scores.astype(np.float64) / params.temperature
    ids = keep(scores, params)
    if ids is None:
        return winner(scores, params.seed, position)
    return int(ids[np.argmax(scores[ids] + gumbel(params.seed, position, ids))])


def adjust(logits: npt.NDArray[np.float32], params: SamplingParams, draw: Draw) -> npt.NDArray[np.float32] | Floats:
    """Return the logits after bias and penalties, what must not be chosen at −∞; as they are where nothing is asked."""
    if not (params.logit_bias or params.looks_back or params.allowed_tokens or draw.banned or draw.mask is not None):
        return logits
    scores = logits.astype(np.float64)
    if params.logit_bias:
        ids, bias = zip(*params.logit_bias, strict=True)
        scores[list(ids)] += np.array(bias, dtype=np.float64)
    if params.looks_back:
        assert draw.past is not None  # whoever plans the row brings it
        _penalise(scores, params, draw.past)
    if params.allowed_tokens:
        allowed = np.array(params.allowed_tokens)
        kept = scores[allowed]
        scores[:] = -np.inf
        scores[allowed] = kept
    if draw.banned:
        scores[list(draw.banned)] = -np.inf
    if draw.mask is not None:
        scores[~_bits(draw.mask, scores.size)] = -np.inf
    return scores


def _bits(mask: bytes, vocabulary: int) -> npt.NDArray[np.bool_]:
    """Return a mask as [vocabulary] truths; ids beyond it are masked out."""
    bits = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), count=min(vocabulary, 8 * len(mask)), bitorder="little")
    return np.pad(bits.astype(np.bool_), (0, vocabulary - bits.size))


def _penalise(scores: Floats, params: SamplingParams, past: PastTokens) -> None:
    """Apply the penalties in place. Each token's score is changed by itself: the order of ids does not matter."""
    if params.repetition_penalty != 1:
        seen = np.fromiter(past.seen, dtype=np.int64)
        found = scores[seen]
        scores[seen] = np.where(found > 0, found / params.repetition_penalty, found * params.repetition_penalty)
    if past.counts:
        ids = np.fromiter(past.counts, dtype=np.int64)
        counts = np.fromiter(past.counts.values(), dtype=np.float64)
        scores[ids] -= params.frequency_penalty * counts + params.presence_penalty


def keep(scores: Floats, params: SamplingParams) -> Ids | None:
    """Return the ids that top-k, top-p and min-p leave, ascending; None where they leave all.

    Cost: a pass or two over the scores; only what may be kept is put in order.
    """
    ids: Ids | None = None
    best = scores.max()
    if 0 < params.top_k < scores.size:
        ids = _best(scores, params.top_k)
    if params.top_p < 1:
        ids = _nucleus(scores, ids, params.top_p)
    if params.min_p > 0:
        among = np.arange(scores.size) if ids is None else ids
        ids = among[np.exp(scores[among] - best) >= params.min_p]  # relative to the best, whose weight is 1
    return None if ids is None else np.sort(ids)


def _best(scores: Floats, count: int) -> Ids:
    """Return the ids of the `count` best, best first, ties by lowest id."""
    edge = np.partition(scores, scores.size - count)[scores.size - count]
    above = np.flatnonzero(scores > edge)
    ids = np.concatenate((above, np.flatnonzero(scores == edge)[: count - above.size]))
    ranked: Ids = ids[np.lexsort((ids, -scores[ids]))]
    return ranked


def _nucleus(scores: Floats, ids: Ids | None, share: float) -> Ids:
    """Return, of `ids` or of all, the best that hold `share` of the mass together; the best always."""
    best = scores.max()
    total = np.exp((scores if ids is None else scores[ids]) - best).sum()
    ranked = _best(scores, min(FIRST_LOOK, scores.size)) if ids is None else ids
    while True:
        weights = np.exp(scores[ranked] - best)
        mass = np.cumsum(weights)
        if ids is not None or ranked.size == scores.size or mass[-1] >= share * total:
            break
        ranked = _best(scores, min(8 * ranked.size, scores.size))
    kept = mass - weights < share * total  # the mass of what is better
    kept[0] = True
    nucleus: Ids = ranked[kept]
    return nucleus


def winner(scores: Floats, seed: int, position: int) -> int:
    """Return the id whose score and noise together are most, ties by lowest id.

    What most of a vocabulary lacks to win is seen from the hash and the score alone; see `_hopeful`.
    """
    state = _state(seed, position)
    token, most = 0, -math.inf
    for start in range(0, scores.size, PART):
        part = scores[start : start + PART]
        words = _mix(_MULTIPLES[: part.size] + np.uint64((state + start * _A) % 2**64))
        ids = _hopeful(part, words, most)
        if ids.size:
            values = part[ids] + _noise(words[ids])
            at = int(np.argmax(values))
            if values[at] > most:
                token, most = start + int(ids[at]), float(values[at])
    return token


def _hopeful(scores: Floats, words: Words, most: float) -> Ids:
    """Return the ids, ascending, that may have a sum above `most` and all others'; the one that has is among them.

    The best score and the best noise are of two tokens whose sums are worked out first. Another one must be able to
    come up to them with the best noise, and with the best score. Of those left, a noise is below −log(1 − u), which is
    found from the exponent of 1 − u alone.
    """
    best, luckiest = int(np.argmax(scores)), int(np.argmax(words))
    if scores[best] == -np.inf:
        return np.empty(0, dtype=np.intp)
    noise = _noise(words[[best, luckiest]])
    least = _below(max(most, float(scores[best] + noise[0]), float(scores[luckiest] + noise[1])))
    ids = np.flatnonzero((scores >= _below(least - noise[1])) & (words >= _least_word(least - scores[best])))
    bound = scores[ids] + (1 - np.frexp(1 - _uniform(words[ids]))[1]) * LOG_2
    if ids.size:
        likely = ids[np.argmax(bound)]
        least = max(least, _below(float(scores[likely] + _noise(words[likely]))))
    found: Ids = ids[bound >= least]
    return found


def _below(bound: float) -> float:
    """Return a little less, by what a bound may have been rounded."""
    return bound - SLACK * max(1.0, abs(bound))


def _least_word(noise: float) -> np.uint64:
    """Return a word at or below all those whose noise is at least `noise`."""
    uniform = math.exp(-math.exp(-noise)) if noise > -MOST_EXPONENT else 0.0
    return np.uint64(max(0, int(uniform * (1 - SLACK) * 2**53) - 1) << 11)


def gumbel(seed: int, position: int, ids: Ids) -> Floats:
    """Return the noise of vocabulary ids at `position`, in their order."""
    noise: Floats = _noise(_mix(ids.astype(np.uint64) * np.uint64(_A) + np.uint64(_state(seed, position))))
    return noise


def _state(seed: int, position: int) -> int:
    return _mixed((seed * _A + _mixed((position * _B + _C) % 2**64)) % 2**64)


def _noise(words: Any) -> Any:
    return -np.log(-np.log(_uniform(words)))


def _uniform(words: Any) -> Any:
    return ((words >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53


def _mix(words: Words) -> Words:
    """Return the words mixed, in their own memory."""
    shifted = words >> np.uint64(30)
    words ^= shifted
    words *= np.uint64(_M)
    np.right_shift(words, np.uint64(27), out=shifted)
    words ^= shifted
    words *= np.uint64(_N)
    np.right_shift(words, np.uint64(31), out=shifted)
    words ^= shifted
    return words


def _mixed(word: int) -> int:
    """Return the same for one word."""
    word = (word ^ (word >> 30)) * _M % 2**64
    word = (word ^ (word >> 27)) * _N % 2**64
    return word ^ (word >> 31)
