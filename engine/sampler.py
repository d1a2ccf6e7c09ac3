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

import numpy as np
import numpy.typing as npt

from engine.plan import Draw, PastTokens
from engine.request import SamplingParams

Floats = npt.NDArray[np.float64]
Words = npt.NDArray[np.uint64]

ANYWHERE = Draw(0)  # nothing stands before, nothing is ruled out

_A = np.uint64(0x9E3779B97F4A7C15)
_B = np.uint64(0xD1B54A32D192ED03)
_C = np.uint64(0x8CB92BA72F3D8DD7)


def sample(logits: npt.NDArray[np.float32], params: SamplingParams, position: int, draw: Draw = ANYWHERE) -> int:
    """Return the token for `position` (absolute, of the token to be drawn) from logits [V].

    `draw.past` is needed where `params.looks_back`. At least one token must be left that may be sampled.
    """
    scores = adjust(logits, params, draw)
    if params.temperature == 0:
        return int(np.argmax(scores))
    scores = keep(scores.astype(np.float64) / params.temperature, params)
    return int(np.argmax(scores + gumbel(params.seed, position, scores.size)))


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


def keep(scores: Floats, params: SamplingParams) -> Floats:
    """Return the scores with everything that top-k, top-p and min-p exclude at −∞."""
    if params.top_k == 0 and params.top_p >= 1 and params.min_p <= 0:
        return scores
    order = np.argsort(-scores, kind="stable")  # best first, ties by lowest id
    kept = scores[order]
    if 0 < params.top_k < kept.size:
        kept[params.top_k :] = -np.inf
    weights = np.exp(kept - kept[0])
    if params.top_p < 1:
        before = np.cumsum(weights) - weights  # mass of what is better
        kept[before >= params.top_p * weights.sum()] = -np.inf
        kept[0] = scores[order[0]]  # the best always stays
    if params.min_p > 0:
        kept[weights < params.min_p] = -np.inf  # relative to the best, whose weight is 1
    result = np.empty_like(scores)
    result[order] = kept
    return result


def gumbel(seed: int, position: int, vocabulary: int) -> Floats:
    """Return the noise of every vocabulary id at `position`, [vocabulary]."""
    with np.errstate(over="ignore"):
        state = _mix(np.uint64(seed) * _A + _mix(np.uint64(position) * _B + _C))
        words = _mix(state + np.arange(vocabulary, dtype=np.uint64) * _A)
    uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53
    noise: Floats = -np.log(-np.log(uniform))
    return noise


def _mix(word: np.uint64 | Words) -> Words:
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(word ^ (word >> np.uint64(31)))
