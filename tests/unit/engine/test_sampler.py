from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.plan import Draw, PastTokens
from engine.request import MAX_SEED, SamplingParams
from engine.sampler import adjust, gumbel, keep, sample, winner

GOLDEN_FIRST = [582, 882, 849, 692, 937, 990, 704, 996]
GOLDEN_ALL = "dfb81738ffea6b27465ebadd1ef972f87c6f0a53e41bf462e4e52a2c0aafb7f0"


def params(**changes: object) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 1, "seed": 7} | changes))  # type: ignore[arg-type]


def logits(count: int = 50, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(count) * 3).astype(np.float32)


def mix(word: int) -> int:
    """SplitMix64's finaliser in plain integers."""
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
    return word ^ (word >> 31)


def noise_reference(seed: int, position: int, token: int) -> float:
    golden = 0x9E3779B97F4A7C15
    state = mix((seed * golden + mix((position * 0xD1B54A32D192ED03 + 0x8CB92BA72F3D8DD7) % 2**64)) % 2**64)
    word = mix((state + token * golden) % 2**64)
    return -math.log(-math.log(((word >> 11) + 0.5) / 2**53))


@given(seed=st.integers(0, MAX_SEED), position=st.integers(0, 10**6), vocabulary=st.integers(1, 70))
def test_noise_equals_the_formula_in_plain_integers(seed: int, position: int, vocabulary: int) -> None:
    expected = [noise_reference(seed, position, token) for token in range(vocabulary)]
    np.testing.assert_allclose(gumbel(seed, position, np.arange(vocabulary)), expected, rtol=1e-12, atol=1e-12)


def test_the_tokens_of_a_seed_never_change() -> None:
    """Golden: a recorded answer must be drawn again in years. A change here is a new numeric contract."""
    row = np.linspace(-2, 2, 1000, dtype=np.float32)
    drawn = [sample(row, params(seed=2**62 + 5, top_p=0.9), position) for position in range(64)]
    assert drawn[:8] == GOLDEN_FIRST
    assert hashlib.sha256(repr(drawn).encode()).hexdigest() == GOLDEN_ALL


def test_noise_depends_on_each_of_seed_position_and_token_and_on_nothing_else() -> None:
    base = gumbel(1, 2, np.arange(100))
    assert np.array_equal(base, gumbel(1, 2, np.arange(100)))
    assert np.array_equal(base[:37], gumbel(1, 2, np.arange(37)))
    assert not np.isin(base, gumbel(2, 2, np.arange(100))).any()
    assert not np.isin(base, gumbel(2, 1, np.arange(100))).any()
    assert len(set(base.tolist())) == 100
    assert np.isfinite(gumbel(MAX_SEED, 2**40, np.arange(200_000))).all()


def test_greedy_takes_the_lowest_of_the_best() -> None:
    row = np.array([1, 5, 5, 2, 5], dtype=np.float32)
    assert sample(row, params(temperature=0.0), 3) == 1


def test_draws_follow_the_distribution() -> None:
    row = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    counts = np.bincount([sample(row, params(), position) for position in range(20_000)], minlength=4)
    np.testing.assert_allclose(counts / 20_000, [0.5, 0.3, 0.15, 0.05], atol=0.015)


def test_temperature_sharpens_before_anything_is_excluded() -> None:
    row = np.log(np.array([0.5, 0.3, 0.2], dtype=np.float32))
    counts = np.bincount([sample(row, params(temperature=0.5), at) for at in range(20_000)], minlength=3)
    np.testing.assert_allclose(counts / 20_000, np.array([0.25, 0.09, 0.04]) / 0.38, atol=0.015)


def kept(row: np.ndarray, **changes: object) -> set[int]:
    ids = keep(row.astype(np.float64), params(**changes))
    return set(range(row.size)) if ids is None else set(ids.tolist())


def keep_reference(scores: np.ndarray, chosen: SamplingParams) -> set[int]:
    """By putting everything in order."""
    order = sorted(range(scores.size), key=lambda index: (-scores[index], index))
    if 0 < chosen.top_k < scores.size:
        order = order[: chosen.top_k]
    weights = [math.exp(scores[index] - scores.max()) for index in order]
    total = math.fsum(weights)
    left = [order[at] for at in range(len(order)) if at == 0 or math.fsum(weights[:at]) < chosen.top_p * total]
    if chosen.top_p >= 1:
        left = order
    return {index for index in left if math.exp(scores[index] - scores.max()) >= chosen.min_p}


@given(
    seed=st.integers(0, 10**6),
    count=st.sampled_from([1, 2, 50, 257, 3000]),
    spread=st.sampled_from([0.0, 0.3, 4.0]),
    top_k=st.sampled_from([0, 1, 7, 300, 5000]),
    top_p=st.sampled_from([1.0, 0.9, 0.31, 0.001]),
    min_p=st.sampled_from([0.0, 0.07]),
)
def test_what_is_kept_is_what_putting_everything_in_order_keeps(
    seed: int, count: int, spread: float, top_k: int, top_p: float, min_p: float
) -> None:
    row = np.round(np.random.default_rng(seed).normal(size=count) * spread, 3)  # with ties
    row[:: max(1, count // 3)] = -np.inf if count > 2 else 0.0
    row[-1] = 0.0
    chosen = params(top_k=top_k, top_p=top_p, min_p=min_p)
    assert kept(row, top_k=top_k, top_p=top_p, min_p=min_p) == keep_reference(row, chosen)


@given(
    seed=st.integers(0, MAX_SEED),
    position=st.integers(0, 10**5),
    count=st.sampled_from([1, 2, 999, 20_000]),
    temperature=st.sampled_from([1e-6, 0.1, 1.0, 2.0]),
)
def test_the_winner_is_the_one_that_working_out_every_noise_finds(
    seed: int, position: int, count: int, temperature: float
) -> None:
    row = logits(count, seed % 1000).astype(np.float64) / temperature
    row[:: max(2, count // 5)] = -np.inf
    expected = int(np.argmax(row + gumbel(seed, position, np.arange(count))))
    assert winner(row, seed, position) == expected


def test_each_rule_keeps_what_it_says() -> None:
    row = np.log(np.array([0.1, 0.4, 0.2, 0.3], dtype=np.float32))
    assert kept(row) == {0, 1, 2, 3}
    assert kept(row, top_k=2) == {1, 3}
    assert kept(row, top_k=9) == {0, 1, 2, 3}
    assert kept(row, top_p=0.5) == {1, 3}
    assert kept(row, top_p=1e-9) == {1}
    assert kept(row, min_p=0.5 + 1e-6) == {1, 3}
    assert kept(row, min_p=1.0) == {1}
    # The order: top-p counts the mass of what top-k left, 0.4 of 0.7.
    assert kept(row, top_k=2, top_p=0.55) == {1}


def test_ties_at_the_edge_keep_the_lowest_ids() -> None:
    row = np.zeros(10, dtype=np.float32)
    assert kept(row, top_k=3) == {0, 1, 2}
    assert kept(row, top_p=0.35) == {0, 1, 2, 3}
    assert kept(row, min_p=1.0) == set(range(10))


def past(prompt: list[int], output: list[int]) -> PastTokens:
    tokens = PastTokens(prompt)
    for token in output:
        tokens.add(token)
    return tokens


def adjusted_reference(
    row: np.ndarray, chosen: SamplingParams, prompt: list[int], output: list[int], banned: tuple[int, ...]
) -> list[float]:
    """Bias, penalties and masks, one token at a time."""
    bias = dict(chosen.logit_bias)
    scores = []
    for token, logit in enumerate(row.tolist()):
        score = logit + bias.get(token, 0.0)
        if token in prompt or token in output:
            score = score / chosen.repetition_penalty if score > 0 else score * chosen.repetition_penalty
        if token in output:
            score -= chosen.frequency_penalty * output.count(token) + chosen.presence_penalty
        if (chosen.allowed_tokens and token not in chosen.allowed_tokens) or token in banned:
            score = -math.inf
        scores.append(score)
    return scores


TOKENS = st.lists(st.integers(0, 29), max_size=40)


@given(
    seed=st.integers(0, 1000),
    bias=st.dictionaries(st.integers(0, 29), st.floats(-100, 100), max_size=8),
    repetition=st.floats(0.01, 2.0),
    frequency=st.floats(-2, 2),
    presence=st.floats(-2, 2),
    allowed=st.sets(st.integers(0, 29), max_size=5),
    banned=st.sets(st.integers(0, 29), max_size=5),
    prompt=TOKENS,
    output=TOKENS,
)
def test_bias_penalties_and_masks_equal_the_definition_token_by_token(
    seed: int,
    bias: dict[int, float],
    repetition: float,
    frequency: float,
    presence: float,
    allowed: set[int],
    banned: set[int],
    prompt: list[int],
    output: list[int],
) -> None:
    chosen = params(
        logit_bias=tuple(sorted(bias.items())),
        repetition_penalty=repetition,
        frequency_penalty=frequency,
        presence_penalty=presence,
        allowed_tokens=tuple(sorted(allowed)),
    )
    row = logits(30, seed)
    before = row.copy()
    scores = adjust(row, chosen, Draw(0, past(prompt, output), tuple(banned)))
    expected = adjusted_reference(row, chosen, prompt, output, tuple(banned))
    np.testing.assert_allclose(scores, expected, rtol=1e-12)
    assert np.array_equal(row, before)  # the logits are the log-probabilities' too
    if np.isfinite(expected).any():
        assert np.isfinite(expected[sample(row, chosen, 3, Draw(0, past(prompt, output), tuple(banned)))])
        greedy = params(**{name: getattr(chosen, name) for name in ADJUSTMENTS}, temperature=0.0)
        assert sample(row, greedy, 3, Draw(0, past(prompt, output), tuple(banned))) == int(np.argmax(scores))


ADJUSTMENTS = ("logit_bias", "repetition_penalty", "frequency_penalty", "presence_penalty", "allowed_tokens")


def test_the_order_in_which_tokens_were_seen_changes_no_bit() -> None:
    chosen = params(repetition_penalty=1.3, frequency_penalty=0.7, presence_penalty=0.1)
    tokens = [5, 1, 40, 5, 5, 22, 1]
    one = adjust(logits(), chosen, Draw(0, past([9, 8], tokens)))
    other = adjust(logits(), chosen, Draw(0, past([8, 9, 9], tokens[::-1])))
    assert one.tobytes() == other.tobytes()


def test_where_nothing_is_asked_the_logits_are_taken_as_they_are() -> None:
    row = logits()
    assert adjust(row, params(), Draw(0)) is row


@given(
    seed=st.integers(0, 1000),
    top_k=st.integers(0, 60),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 1.0),
    temperature=st.floats(1e-6, 2.0),
)
def test_something_is_always_kept_and_drawn_from(
    seed: int, top_k: int, top_p: float, min_p: float, temperature: float
) -> None:
    chosen = params(seed=seed, top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)
    row = logits(seed=seed)
    token = sample(row, chosen, seed)
    ids = keep(row.astype(np.float64) / temperature, chosen)
    assert ids is None or token in ids


@pytest.mark.parametrize("rule", [{}, {"top_k": 20}, {"top_p": 0.9, "min_p": 0.02}])
def test_a_row_draws_the_same_wherever_it_lies_in_memory(rule: dict[str, float]) -> None:
    for count in (1, 7, 1023, 1025):
        row = logits(count)
        expected = [sample(row, params(**rule), position) for position in range(20)]
        for offset in (1, 3, 5):
            moved = np.concatenate([logits(offset), row])[offset:]
            assert [sample(moved, params(**rule), position) for position in range(20)] == expected
