"""The sampler on a GPU: a batch's logits, how each request is sampled, its position → one token a row. No sort, no
generator with a state: what engine/sampler.py does for one row, for all rows at once.

Order, fixed: bias → penalties (repetition, frequency, presence) → mask → temperature → top-k → top-p → min-p → Gumbel
argmax, in float64. Ties go to the lowest id, everywhere. A token's noise is a counter hash of (seed, position, id):

    state = mix(seed · A + mix(position · B + C))      64 bits, wrapping
    u     = ((mix(state + id · A) >> 11) + 0.5) / 2**53      in (0, 1)
    noise = −log(−log(u))                                    standard Gumbel, float64

Top-k and top-p are a threshold each, found by search among the values that a float64 can have, in ascending order of
their bits as integers: each pass over a row counts, or adds up the weights of, what lies above three candidates and
keeps a quarter of the range, until one token or one value is left in it. Of tokens that are equal at the threshold the
lowest ids stay. At most 33 passes each, none for rows that do not ask. Where values differ they are fewer by far: two
to seven for random rows of 151,936, counted on a CPU, since the search begins near the best. The pass that finds the
highest score finds that of every column of the row laid out in blocks, too; as many tokens as there are columns, 1,024,
lie at or above the lowest of these.

Numeric contract: a row's token depends on its logits, parameters and position alone. What is added up, the mass that
top-p looks at, is added up by one program in an order fixed by the vocabulary and the launch table; whatever several
programs share is a maximum, which has no order. Against engine/sampler.py every operation is the same one in the same
order, save these: exponential and logarithm are the GPU's, which may differ in the last bit, and that mass is added in
another order. A token differs where that decides. It is another numeric policy.

Source: Gumbel-max trick (Maddison et al., 2014); mix is the finaliser of SplitMix64 (Steele et al., 2014); min-p
(Nguyen et al., 2024); repetition penalty (Keskar et al., 2019); frequency and presence penalties: the OpenAI API.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.jit import Block, Pointer, jit, tl
from kernels.launch import device_of, launch_for, power_of_two
from kernels.shape import ShapeError, check_layout, check_shape

PART = 8192  # tokens that a program draws among
WORD = 32  # tokens of a word of a mask


@dataclass(frozen=True, slots=True)
class Bias:
    """What is added to some tokens' logits first. Unused places hold an id of at least V, after the others."""

    ids: Tensor  # [S, B] int32, ascending
    values: Tensor  # [S, B] float64


@dataclass(frozen=True, slots=True)
class Penalties:
    """What a token loses for having stood before."""

    history: Tensor  # [S, V] int32  2 · (times in the output) + (1 if it is in the prompt)
    repetition: Tensor  # [S] float64, > 0; 1: none. Logits above 0 are divided by it, others multiplied
    frequency: Tensor  # [S] float64, taken off for every time in the output
    presence: Tensor  # [S] float64, taken off once for a token of the output


@dataclass(frozen=True, slots=True)
class Cuts:
    """Which of the likeliest tokens may be drawn. Nothing is cut where the temperature is 0."""

    top_k: Tensor  # [S] int32, ≥ 0; 0: all
    top_p: Tensor  # [S] float64, (0, 1]
    min_p: Tensor  # [S] float64, [0, 1]


@dataclass(frozen=True, slots=True)
class SamplingTables:
    """How each of S requests is sampled. None: of no request is it asked."""

    temperature: Tensor  # [S] float64, ≥ 0; 0: the likeliest token
    seed: Tensor  # [S] int64
    bias: Bias | None = None
    penalties: Penalties | None = None
    mask: Tensor | None = None  # [S, ⌈V / 32⌉] int32, one bit an id, the lowest first; only what is set may be drawn
    cuts: Cuts | None = None


def sample(
    logits: Tensor,  # [R, V] float32, finite or −∞; NaN is never drawn
    request: Tensor,  # [R] int32  each row's request, < S
    position: Tensor,  # [R] int64  absolute, of the token to be drawn
    tables: SamplingTables,
) -> Tensor:  # [R] int64
    """Return a token for every row. At least one token of a row may be drawn: where none may it is token 0.

    Raises:
        ShapeError: an argument disagrees with the shapes above.

    Cost: one pass over the logits, and for rows that ask for top-k or top-p one for every step of the search.
    """
    _check(logits, request, position, tables)
    if logits.is_cuda:
        return sample_triton(logits, request, position, tables)
    return sample_reference(logits, request, position, tables)


def sample_triton(logits: Tensor, request: Tensor, position: Tensor, tables: SamplingTables) -> Tensor:
    """Return `sample` by the kernels: where each row is cut, the best of every part of it, the best of those."""
    rows, width = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows == 0:
        return tokens
    launch = launch_for("sample", width, device_of(logits))
    scored = _scored(logits.contiguous(), request, tables)
    edge, last, best = _cut(scored, rows, tables.cuts, launch.block_n, launch.options)
    parts = -(-width // PART)
    values = torch.empty(rows, parts, dtype=torch.float64, device=logits.device)
    ids = torch.empty(rows, parts, dtype=torch.int32, device=logits.device)
    _draw_kernel[(rows, parts)](
        **scored,
        seed=tables.seed,
        position=position,
        min_p=None if tables.cuts is None else tables.cuts.min_p,
        edge=edge,
        last=last,
        best=best,
        values=values,
        ids=ids,
        PARTS=parts,
        PART_WIDTH=PART,
        BLOCK=launch.block_n,
        **launch.options,
    )
    _best_kernel[(rows,)](values, ids, tokens, PARTS=parts, WIDTH=width, BLOCK=power_of_two(parts), **launch.options)
    return tokens


def _scored(logits: Tensor, request: Tensor, tables: SamplingTables) -> dict[str, object]:
    """Return the arguments by which every kernel works out a token's score."""
    bias, penalties = tables.bias, tables.penalties
    return {
        "logits": logits,
        "request": request,
        "temperature": tables.temperature,
        "bias_ids": None if bias is None else bias.ids,
        "biases": None if bias is None else bias.values,
        "history": None if penalties is None else penalties.history,
        "repetition": None if penalties is None else penalties.repetition,
        "frequency": None if penalties is None else penalties.frequency,
        "presence": None if penalties is None else penalties.presence,
        "mask": tables.mask,
        "WIDTH": logits.shape[1],
        "BIASES": 1 if bias is None else bias.ids.shape[1],
        "BIAS_BLOCK": 1 if bias is None else power_of_two(bias.ids.shape[1]),
    }


def _cut(
    scored: dict[str, object], rows: int, cuts: Cuts | None, block: int, options: dict[str, int | bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return each row's threshold as an ordered integer, the last id that stays of those on it, and its best score."""
    if cuts is None:
        return None, None, None
    device = cuts.top_k.device
    edge = torch.empty(rows, dtype=torch.int64, device=device)
    last = torch.empty(rows, dtype=torch.int32, device=device)
    best = torch.empty(rows, dtype=torch.float64, device=device)
    _cut_kernel[(rows,)](
        **scored,
        top_k=cuts.top_k,
        top_p=cuts.top_p,
        min_p=cuts.min_p,
        edge=edge,
        last=last,
        best=best,
        BLOCK=block,
        **options,
    )
    return edge, last, best


@jit
def _scores(
    start: Block,  # the first of BLOCK tokens
    row: Block,
    of: Block,  # the row's request
    logits: Pointer,  # [R, WIDTH] float32
    temperature: Pointer,  # [S] float64
    bias_ids: Pointer,  # [S, BIASES] int32, or None
    biases: Pointer,  # [S, BIASES] float64, or None
    history: Pointer,  # [S, WIDTH] int32, or None
    repetition: Pointer,  # [S] float64, or None
    frequency: Pointer,  # [S] float64, or None
    presence: Pointer,  # [S] float64, or None
    mask: Pointer,  # [S, ⌈WIDTH / 32⌉] int32, or None
    WIDTH: tl.constexpr,
    BIASES: tl.constexpr,
    BIAS_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> Block:
    """Return the scores [BLOCK] float64 of tokens after bias, penalties, mask and temperature; −∞ what is ruled out."""
    column = start + tl.arange(0, BLOCK)
    inside = column < WIDTH
    score = tl.load(logits + row * WIDTH + column, mask=inside, other=float("-inf")).to(tl.float64)
    if bias_ids is not None:
        place = tl.arange(0, BIAS_BLOCK)
        ids = tl.load(bias_ids + of * BIASES + place, mask=place < BIASES, other=WIDTH)
        first = tl.sum((ids < start).to(tl.int32), axis=0)
        for at in range(first, tl.sum((ids < tl.minimum(start + BLOCK, WIDTH)).to(tl.int32), axis=0)):
            biased = column == tl.load(bias_ids + of * BIASES + at)
            score = tl.where(biased, score + tl.load(biases + of * BIASES + at), score)
    if history is not None:
        past = tl.load(history + of * WIDTH + column, mask=inside, other=0)
        repeated = tl.load(repetition + of)
        score = tl.where(past > 0, tl.where(score > 0, score / repeated, score * repeated), score)
        lost = tl.load(frequency + of) * (past >> 1).to(tl.float64) + tl.load(presence + of)
        score = tl.where(past > 1, score - lost, score)
    if mask is not None:
        words = (WIDTH + 31) // 32
        word = tl.load(mask + of * words + column // 32, mask=inside, other=0)
        score = tl.where((word >> (column % 32)) & 1 != 0, score, float("-inf"))
    heat = tl.load(temperature + of)
    score = score / tl.where(heat == 0, 1.0, heat)
    return tl.where(score == score, score, float("-inf"))


@jit
def _ordered(score: Block) -> Block:
    """Return float64 as int64 of the same order; both zeros are 0."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int64, bitcast=True)
    return bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)


@jit
def _unordered(key: Block) -> Block:
    return (key ^ ((key >> 63) & 0x7FFFFFFFFFFFFFFF)).to(tl.float64, bitcast=True)


@jit
def _cut_kernel(
    logits: Pointer,
    request: Pointer,  # [R]
    temperature: Pointer,
    bias_ids: Pointer,
    biases: Pointer,
    history: Pointer,
    repetition: Pointer,
    frequency: Pointer,
    presence: Pointer,
    mask: Pointer,
    top_k: Pointer,  # [S]
    top_p: Pointer,  # [S]
    min_p: Pointer,  # [S]
    edge: Pointer,  # [R] int64  the row's threshold
    last: Pointer,  # [R] int32  of the tokens on it, the last that stays
    best: Pointer,  # [R] float64  the row's highest score
    WIDTH: tl.constexpr,
    BIASES: tl.constexpr,
    BIAS_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    of = tl.load(request + row).to(tl.int64)
    count, share, least = tl.load(top_k + of), tl.load(top_p + of), tl.load(min_p + of)
    most = tl.full((), 0, tl.float64)
    floor = tl.full((), -0x7FFFFFFFFFFFFFFF, tl.int64)
    final = tl.full((), WIDTH, tl.int32)
    if (tl.load(temperature + of) != 0) & ((count > 0) | (share < 1) | (least > 0)):
        highest = tl.full((BLOCK,), float("-inf"), tl.float64)
        lowest = tl.full((BLOCK,), float("inf"), tl.float64)
        finite = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, WIDTH, BLOCK):
            score = _scores(start, row, of, logits, temperature, bias_ids, biases, history, repetition, frequency,
                            presence, mask, WIDTH, BIASES, BIAS_BLOCK, BLOCK)  # fmt: skip
            highest = tl.maximum(highest, score)
            lowest = tl.minimum(lowest, tl.where(score > float("-inf"), score, float("inf")))
            finite += (score > float("-inf")).to(tl.int32)
        held = tl.sum(finite, axis=0)
        if held > 0:
            most = tl.max(highest, axis=0)
            floor = _ordered(tl.min(lowest, axis=0))
            near = tl.maximum(_ordered(tl.min(highest, axis=0)), floor)  # BLOCK tokens are there, or it is the lowest
            if (count > 0) & (count < held):
                low = tl.where(count <= BLOCK, near, floor)
                floor, final = _search(
                    count.to(tl.float64), low, _ordered(most) + 1, held, floor, final, most, False,
                    row, of, logits, temperature, bias_ids, biases, history, repetition, frequency,
                    presence, mask, WIDTH, BIASES, BIAS_BLOCK, BLOCK)  # fmt: skip
                held = count
            if share < 1:
                near = tl.maximum(near, floor)
                total, reached, _, _, held_near, _ = _measure(
                    floor, near, near, floor, final, most, True,
                    row, of, logits, temperature, bias_ids, biases, history, repetition, frequency,
                    presence, mask, WIDTH, BIASES, BIAS_BLOCK, BLOCK)  # fmt: skip
                enough = reached >= share * total
                low, held = tl.where(enough, near, floor), tl.where(enough, held_near, held)
                floor, final = _search(
                    share * total, low, _ordered(most) + 1, held, floor, final, most, True,
                    row, of, logits, temperature, bias_ids, biases, history, repetition, frequency,
                    presence, mask, WIDTH, BIASES, BIAS_BLOCK, BLOCK)  # fmt: skip
    tl.store(edge + row, floor)
    tl.store(last + row, final)
    tl.store(best + row, most)


@jit
def _search(
    target: Block,  # > 0
    low: Block,  # what lies at or above it reaches the target
    high: Block,  # what lies at or above it does not
    held: Block,  # how many tokens lie in between, or more
    floor: Block,  # the tokens looked at: above this threshold,
    final: Block,  # and of those on it up to this id
    most: Block,
    BY_MASS: tl.constexpr,  # the target is of the sum of weights; otherwise of the number of tokens
    row: Block,
    of: Block,
    logits: Pointer,
    temperature: Pointer,
    bias_ids: Pointer,
    biases: Pointer,
    history: Pointer,
    repetition: Pointer,
    frequency: Pointer,
    presence: Pointer,
    mask: Pointer,
    WIDTH: tl.constexpr,
    BIASES: tl.constexpr,
    BIAS_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tuple[Block, Block]:
    """Return the highest threshold whose tokens reach the target, and the last id on it that is needed for that."""
    above = tl.full((), 0, tl.float64)  # what lies at or above `high`
    count, count_above = held, tl.full((), 0, tl.int32)
    while (count - count_above > 1) & (high - low != 1):
        quarter = (high - low).to(tl.uint64, bitcast=True) >> 2  # the range may be wider than an int64
        step = tl.maximum(quarter, 1).to(tl.int64, bitcast=True)
        first = low + step
        second = tl.where(quarter > 0, first + step, first)
        third = tl.where(quarter > 0, second + step, first)
        mass_1, mass_2, mass_3, count_1, count_2, count_3 = _measure(
            first, second, third, floor, final, most, BY_MASS,
            row, of, logits, temperature, bias_ids, biases, history, repetition, frequency,
            presence, mask, WIDTH, BIASES, BIAS_BLOCK, BLOCK)  # fmt: skip
        if mass_3 >= target:
            low, count = third, count_3
        elif mass_2 >= target:
            low, count, high, above, count_above = second, count_2, third, mass_3, count_3
        elif mass_1 >= target:
            low, count, high, above, count_above = first, count_1, second, mass_2, count_2
        else:
            high, above, count_above = first, mass_1, count_1
    stays = tl.full((), WIDTH, tl.int32)
    if count - count_above > 1:  # they are equal
        needed = target - above
        if BY_MASS:
            needed = tl.ceil(needed / tl.exp(_unordered(low) - most))
        wanted = tl.clamp(needed, 1.0, (count - count_above).to(tl.float64)).to(tl.int32)
        before = tl.full((), 0, tl.int32)
        for start in range(0, WIDTH, BLOCK):
            score = _scores(start, row, of, logits, temperature, bias_ids, biases, history, repetition, frequency,
                            presence, mask, WIDTH, BIASES, BIAS_BLOCK, BLOCK)  # fmt: skip
            column = start + tl.arange(0, BLOCK)
            on = ((_ordered(score) == low) & ((low > floor) | (column <= final))).to(tl.int32)
            found = (on > 0) & (before + tl.cumsum(on, axis=0) == wanted)
            stays = tl.minimum(stays, tl.min(tl.where(found, column, WIDTH), axis=0))
            before += tl.sum(on, axis=0)
    stays = tl.where(low == floor, tl.minimum(stays, final), stays)
    return low, stays


@jit
def _measure(
    first: Block,
    second: Block,
    third: Block,
    floor: Block,
    final: Block,
    most: Block,
    BY_MASS: tl.constexpr,
    row: Block,
    of: Block,
    logits: Pointer,
    temperature: Pointer,
    bias_ids: Pointer,
    biases: Pointer,
    history: Pointer,
    repetition: Pointer,
    frequency: Pointer,
    presence: Pointer,
    mask: Pointer,
    WIDTH: tl.constexpr,
    BIASES: tl.constexpr,
    BIAS_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tuple[Block, Block, Block, Block, Block, Block]:
    """Return of three thresholds what is held against the target of those at or above it, and their number."""
    mass_1, count_1 = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.int32)
    mass_2, count_2 = mass_1, count_1
    mass_3, count_3 = mass_1, count_1
    for start in range(0, WIDTH, BLOCK):
        score = _scores(start, row, of, logits, temperature, bias_ids, biases, history, repetition, frequency,
                        presence, mask, WIDTH, BIASES, BIAS_BLOCK, BLOCK)  # fmt: skip
        column = start + tl.arange(0, BLOCK)
        key = _ordered(score)
        member = (key > floor) | ((key == floor) & (column <= final))
        count_1 += (member & (key >= first)).to(tl.int32)
        count_2 += (member & (key >= second)).to(tl.int32)
        count_3 += (member & (key >= third)).to(tl.int32)
        if BY_MASS:  # noqa: SIM102 — known to the compiler, the other is not
            if tl.max(key, axis=0) >= first:  # most blocks have no token that weighs
                weight = tl.where(member, tl.exp(score - most), 0.0)
                mass_1 += tl.where(key >= first, weight, 0.0)
                mass_2 += tl.where(key >= second, weight, 0.0)
                mass_3 += tl.where(key >= third, weight, 0.0)
    held_1, held_2, held_3 = tl.sum(count_1, axis=0), tl.sum(count_2, axis=0), tl.sum(count_3, axis=0)
    if BY_MASS:
        return tl.sum(mass_1, axis=0), tl.sum(mass_2, axis=0), tl.sum(mass_3, axis=0), held_1, held_2, held_3
    return held_1.to(tl.float64), held_2.to(tl.float64), held_3.to(tl.float64), held_1, held_2, held_3


@jit
def _draw_kernel(
    logits: Pointer,
    request: Pointer,  # [R]
    temperature: Pointer,
    bias_ids: Pointer,
    biases: Pointer,
    history: Pointer,
    repetition: Pointer,
    frequency: Pointer,
    presence: Pointer,
    mask: Pointer,
    seed: Pointer,  # [S] int64
    position: Pointer,  # [R] int64
    min_p: Pointer,  # [S] float64, or None
    edge: Pointer,  # [R], or None
    last: Pointer,  # [R], or None
    best: Pointer,  # [R], or None
    values: Pointer,  # [R, PARTS] float64
    ids: Pointer,  # [R, PARTS] int32
    WIDTH: tl.constexpr,
    BIASES: tl.constexpr,
    BIAS_BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    PART_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Find the highest of score and noise together in a part of a row."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    of = tl.load(request + row).to(tl.int64)
    warm = tl.load(temperature + of) != 0
    state = _state(tl.load(seed + of), tl.load(position + row))
    value = tl.full((BLOCK,), float("-inf"), tl.float64)
    token = tl.full((BLOCK,), WIDTH, tl.int32)
    for start in range(part * PART_WIDTH, tl.minimum((part + 1) * PART_WIDTH, WIDTH), BLOCK):
        score = _scores(start, row, of, logits, temperature, bias_ids, biases, history, repetition, frequency,
                        presence, mask, WIDTH, BIASES, BIAS_BLOCK, BLOCK)  # fmt: skip
        column = start + tl.arange(0, BLOCK)
        if warm:
            if edge is not None:
                key, floor = _ordered(score), tl.load(edge + row)
                stays = (key > floor) | ((key == floor) & (column <= tl.load(last + row)))
                least = tl.load(min_p + of)
                stays = stays & (tl.exp(score - tl.load(best + row)) >= least)
                score = tl.where(stays, score, float("-inf"))
            score += _noise(state, column)
        better = score > value  # ids ascend, so that of equals the first stays
        value = tl.where(better, score, value)
        token = tl.where(better, column, token)
    highest = tl.max(value, axis=0)
    tl.store(values + row * PARTS + part, highest)
    tl.store(ids + row * PARTS + part, tl.min(tl.where(value == highest, token, WIDTH), axis=0))


@jit
def _best_kernel(
    values: Pointer,  # [R, PARTS] float64
    ids: Pointer,  # [R, PARTS] int32
    tokens: Pointer,  # [R] int64
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row, part = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    value = tl.load(values + row * PARTS + part, mask=part < PARTS, other=float("-inf"))
    token = tl.load(ids + row * PARTS + part, mask=part < PARTS, other=WIDTH)
    token = tl.min(tl.where(value == tl.max(value, axis=0), token, WIDTH), axis=0)
    tl.store(tokens + row, tl.where(token < WIDTH, token, 0).to(tl.int64))


@jit
def _state(seed: Block, position: Block) -> Block:
    place = position.to(tl.uint64, bitcast=True) * 0xD1B54A32D192ED03 + 0x8CB92BA72F3D8DD7
    return _mix(seed.to(tl.uint64, bitcast=True) * 0x9E3779B97F4A7C15 + _mix(place))


@jit
def _noise(state: Block, column: Block) -> Block:
    word = _mix(state + column.to(tl.uint64) * 0x9E3779B97F4A7C15)
    uniform = ((word >> 11).to(tl.float64) + 0.5) * (1.0 / 9007199254740992.0)  # 2**53
    return -tl.log(-tl.log(uniform))


@jit
def _mix(word: Block) -> Block:
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB
    return word ^ (word >> 31)


def sample_reference(logits: Tensor, request: Tensor, position: Tensor, tables: SamplingTables) -> Tensor:
    """Return the same row by row, with a sort, in float64 on the CPU."""
    drawn = [
        _draw_reference(row.cpu(), of, at, tables)
        for row, of, at in zip(logits, request.tolist(), position.tolist(), strict=True)
    ]
    return torch.tensor(drawn, dtype=torch.int64, device=logits.device)


def _draw_reference(logits: Tensor, of: int, position: int, tables: SamplingTables) -> int:
    scores = _adjusted(logits.double(), of, tables)
    scores[scores.isnan()] = -torch.inf
    heat = float(tables.temperature[of])
    if heat == 0:
        return int(scores.argmax())
    scores = scores / heat
    if tables.cuts is not None:
        scores[~_kept(scores, of, tables.cuts)] = -torch.inf
    ids = torch.arange(len(scores))
    return int((scores + gumbel_reference(int(tables.seed[of]), position, ids)).argmax())


def _adjusted(scores: Tensor, of: int, tables: SamplingTables) -> Tensor:
    if tables.bias is not None:
        ids, values = tables.bias.ids[of].cpu().long(), tables.bias.values[of].cpu()
        within = ids < len(scores)
        scores[ids[within]] += values[within]
    if tables.penalties is not None:
        penalties = tables.penalties
        past, repeated = penalties.history[of].cpu(), float(penalties.repetition[of])
        scores = torch.where(past > 0, torch.where(scores > 0, scores / repeated, scores * repeated), scores)
        lost = float(penalties.frequency[of]) * (past >> 1).double() + float(penalties.presence[of])
        scores = torch.where(past > 1, scores - lost, scores)
    if tables.mask is not None:
        ids = torch.arange(len(scores))
        bits = (tables.mask[of].cpu()[ids // WORD] >> (ids % WORD)) & 1
        scores[bits == 0] = -torch.inf
    return scores


def _kept(scores: Tensor, of: int, cuts: Cuts) -> Tensor:
    """Return [V] truths: what top-k, top-p and min-p leave."""
    count, share, least = int(cuts.top_k[of]), float(cuts.top_p[of]), float(cuts.min_p[of])
    order = scores.argsort(descending=True, stable=True)  # of equals the lowest id goes first
    weights = (scores[order] - scores.max()).exp()
    if 0 < count < len(scores):
        weights[count:] = 0
    before = weights.cumsum(0) - weights
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[order] = (weights > 0) & ((before < share * weights.sum()) | (share >= 1)) & (weights >= least)
    return kept


def gumbel_reference(seed: int, position: int, ids: Tensor) -> Tensor:
    """Return the noise of vocabulary ids [n] at `position`, float64."""
    state = _mix_reference(
        torch.tensor(seed) * _wrapped(0x9E3779B97F4A7C15)
        + _mix_reference(torch.tensor(position) * _wrapped(0xD1B54A32D192ED03) + _wrapped(0x8CB92BA72F3D8DD7))
    )
    words = _mix_reference(state + ids * _wrapped(0x9E3779B97F4A7C15))
    uniform = (_shifted(words, 11).double() + 0.5) / 2.0**53
    return -(-uniform.log()).log()


def _mix_reference(word: Tensor) -> Tensor:
    word = (word ^ _shifted(word, 30)) * _wrapped(0xBF58476D1CE4E5B9)
    word = (word ^ _shifted(word, 27)) * _wrapped(0x94D049BB133111EB)
    return word ^ _shifted(word, 31)


def _shifted(word: Tensor, bits: int) -> Tensor:
    """Return int64 shifted right as 64 bits without a sign."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)


def _wrapped(word: int) -> int:
    """Return 64 bits without a sign as the int64 of the same bits."""
    return word - (1 << 64) if word >> 63 else word


def _check(logits: Tensor, request: Tensor, position: Tensor, tables: SamplingTables) -> None:
    if logits.ndim != 2 or logits.shape[1] < 1 or logits.dtype != torch.float32:
        raise ShapeError(f"`logits` {list(logits.shape)} of {logits.dtype} are not [R, V] float32")
    rows, width = logits.shape
    check_shape("request", request, rows)
    check_shape("position", position, rows)
    check_layout("request", request, torch.int32)
    check_layout("position", position, torch.int64)
    for name, tensor, dtype, shape in _declared(tables, width):
        check_shape(name, tensor, *shape)
        check_layout(name, tensor, dtype)


def _declared(tables: SamplingTables, width: int) -> Iterator[tuple[str, Tensor, torch.dtype, tuple[int, ...]]]:
    """Yield every table that there is, with the dtype and shape that it is declared to have."""
    bias, penalties, mask, cuts = tables.bias, tables.penalties, tables.mask, tables.cuts
    requests = (tables.temperature.shape[0],)
    yield "temperature", tables.temperature, torch.float64, requests
    yield "seed", tables.seed, torch.int64, requests
    if bias is not None:
        yield "bias.ids", bias.ids, torch.int32, (*requests, bias.ids.shape[-1])
        yield "bias.values", bias.values, torch.float64, tuple(bias.ids.shape)
    if penalties is not None:
        yield "penalties.history", penalties.history, torch.int32, (*requests, width)
        for name in ("repetition", "frequency", "presence"):
            yield f"penalties.{name}", getattr(penalties, name), torch.float64, requests
    if mask is not None:
        yield "mask", mask, torch.int32, (*requests, -(-width // WORD))
    if cuts is not None:
        yield "cuts.top_k", cuts.top_k, torch.int32, requests
        yield "cuts.top_p", cuts.top_p, torch.float64, requests
        yield "cuts.min_p", cuts.min_p, torch.float64, requests
