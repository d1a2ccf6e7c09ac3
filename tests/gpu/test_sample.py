"""The sampler by its kernels: the engine's own token for every wish, exact cuts, rows that do not see each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.request import SamplingParams
from engine.sampler import ANYWHERE, gumbel, keep
from engine.sampler import sample as engine_sample
from kernels.jit import INTERPRETED
from kernels.launch import launch_for
from kernels.sample import (
    Bias,
    Cuts,
    Penalties,
    SamplingTables,
    _cut,
    _scored,
    gumbel_reference,
    sample,
    sample_reference,
    sample_triton,
)
from kernels.shape import ShapeError
from tests.support.batches import MOST_ROWS, assert_rows_are_their_own
from tests.support.poison import among_nan
from tests.support.sampling import Sampled, random_request, tables_of

ROWS = 8 if INTERPRETED else 64
SPECIAL = {
    "equal": torch.zeros(300),
    "two values": torch.arange(300).remainder(2).float(),
    "many ties": torch.arange(300).remainder(7).float() - 3,
    "both zeros": torch.tensor([-0.0, 0.0]).repeat(150),
    "one": torch.tensor([3.0]),
    "far apart": torch.tensor([1e30, -1e30, 0.0, 1e-40, -1e-40, 3.0]),
    "one is left": torch.full((300,), -torch.inf).index_fill(0, torch.tensor([123]), -50.0),
    "few are left": torch.full((300,), -torch.inf).index_fill(0, torch.tensor([5, 123, 299]), 2.0),
    "next to each other": 1 + torch.arange(300).float() * 2**-23,
    "wide, many ties": torch.arange(2100).remainder(7).float() - 3,
    "wide, one stands out": torch.arange(2100).remainder(1024).eq(5).float() * 9,
    "falling": -torch.arange(2000).float() / 100,
}


def on(device: torch.device, values: list[float] | list[int], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def plain(requests: int, device: torch.device, **tables: object) -> SamplingTables:
    return SamplingTables(on(device, [1.0] * requests), torch.arange(requests, device=device), **tables)  # type: ignore[arg-type]


def kept_by_kernel(logits: Tensor, tables: SamplingTables) -> Tensor:
    """Return [R, V] truths: which tokens the search leaves, before min-p."""
    rows, width = logits.shape
    launch = launch_for("sample", width, "any")
    request = torch.arange(rows, dtype=torch.int32, device=logits.device)
    scored = _scored(logits, request, tables)
    edge, last, _ = _cut(scored, rows, tables.cuts, launch.block_n, launch.options)
    assert edge is not None
    assert last is not None
    scores = logits.double() / tables.temperature[:, None] + 0.0
    bits = scores.view(torch.int64)
    keys = bits ^ ((bits >> 63) & (2**63 - 1))
    ids = torch.arange(width, device=logits.device)
    return (keys > edge[:, None]) | ((keys == edge[:, None]) & (ids <= last[:, None]))


@pytest.mark.parametrize("vocabulary", [1, 33, 1025] if INTERPRETED else [1, 2, 33, 1023, 1025, 9000, 151_936])
def test_every_row_gets_the_token_that_the_engine_would_draw(
    vocabulary: int, device: torch.device, generator: torch.Generator
) -> None:
    requests = [random_request(vocabulary, generator) for _ in range(ROWS)]
    logits = among_nan(torch.randn(ROWS, vocabulary, generator=generator).mul(3).to(device))
    positions = torch.randint(2**40, (ROWS,), generator=generator)
    tables = tables_of(requests, vocabulary, device)
    order = torch.arange(ROWS, dtype=torch.int32, device=device)
    drawn = sample_triton(logits, order, positions.to(device), tables)
    expected = [
        engine_sample(row, one.params, position, one.draw)
        for row, one, position in zip(logits.cpu().numpy(), requests, positions.tolist(), strict=True)
    ]
    assert drawn.tolist() == expected
    assert sample_reference(logits, order, positions.to(device), tables).tolist() == expected


@pytest.mark.parametrize("name", SPECIAL)
def test_what_top_k_and_top_p_leave_is_exact_where_values_are_alike_or_far_apart(
    name: str, device: torch.device
) -> None:
    row = SPECIAL[name]
    asked = [(0, 1.0), (0, 1e-9), (0, 0.3), (0, 0.999), (1, 0.5), (7, 1.0), (150, 0.3), (1024, 1.0), (1500, 1.0)]
    cuts = Cuts(
        on(device, [k for k, _ in asked], torch.int32),
        on(device, [p for _, p in asked]),
        on(device, [0.0] * len(asked)),
    )
    logits = among_nan(row.repeat(len(asked), 1).to(device))
    kept = kept_by_kernel(logits, plain(len(asked), device, cuts=cuts)).cpu()
    scores = row.double().numpy()
    for (k, p), found in zip(asked, kept, strict=True):
        ids = keep(scores, SamplingParams(max_tokens=1, seed=0, top_k=k, top_p=p))
        expected = np.isin(np.arange(len(row)), np.arange(len(row)) if ids is None else ids)
        drawable = scores > -np.inf
        assert np.array_equal(found.numpy() & drawable, expected & drawable), (k, p)


def test_a_wide_range_of_scores_does_not_overflow_the_search(device: torch.device) -> None:
    logits = torch.tensor([[3e38, -3e38, 1e38, -1e38]], device=device)
    tables = SamplingTables(
        on(device, [1e-250]), on(device, [1], torch.int64),
        cuts=Cuts(on(device, [3], torch.int32), on(device, [1.0]), on(device, [0.0])),
    )  # fmt: skip
    assert kept_by_kernel(logits, tables).tolist() == [[True, False, True, True]]


def asked_of(
    rows: int, vocabulary: int, device: torch.device, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, requests in an order of their own, and positions."""
    logits = torch.randn(rows, vocabulary, generator=generator).to(device)
    request = torch.randperm(rows, generator=generator).int().to(device)
    return logits, request, torch.randint(2**20, (rows,), generator=generator).to(device)


@pytest.mark.parametrize("wishes", [False, True], ids=["none", "every wish"])
def test_the_token_of_a_row_does_not_depend_on_its_neighbours(
    wishes: bool, device: torch.device, generator: torch.Generator
) -> None:
    """Where nothing else is wished for, most take the likeliest. In the interpreter a row of every wish takes a tenth
    of a second: few of them."""
    vocabulary, rows = (40, 20 if wishes else MOST_ROWS) if INTERPRETED else (700, MOST_ROWS)
    logits, request, positions = asked_of(rows, vocabulary, device, generator)
    tables = SamplingTables(on(device, [float(at % 4 == 0) for at in range(rows)]), torch.arange(rows, device=device))
    if wishes:
        tables = tables_of([random_request(vocabulary, generator) for _ in range(rows)], vocabulary, device)

    def drawn(part: slice) -> list[Tensor]:
        return [sample_triton(among_nan(logits[part]), request[part], positions[part], tables)]

    assert_rows_are_their_own(drawn, rows)


def test_a_row_keeps_its_token_among_rows_of_nan_and_in_any_order(
    device: torch.device, generator: torch.Generator
) -> None:
    vocabulary, rows = 700, 8 if INTERPRETED else MOST_ROWS
    logits, request, positions = asked_of(rows, vocabulary, device, generator)
    tables = tables_of([random_request(vocabulary, generator) for _ in range(rows)], vocabulary, device)
    whole = sample_triton(logits, request, positions, tables)
    for row in (0, rows - 1):
        poisoned = torch.full_like(logits, torch.nan)
        poisoned[row] = logits[row]
        assert sample_triton(poisoned, request, positions, tables)[row].item() == whole[row].item()
    shuffled = torch.randperm(rows, generator=generator).to(device)
    mixed = sample_triton(logits[shuffled], request[shuffled], positions[shuffled], tables)
    assert torch.equal(mixed, whole[shuffled])


def test_one_request_may_be_drawn_for_at_many_positions(device: torch.device, generator: torch.Generator) -> None:
    logits = torch.randn(1, 500, generator=generator).to(device).expand(40, -1)
    same = torch.ones(40, dtype=torch.int32, device=device)
    drawn = sample_triton(logits, same, torch.arange(40, device=device), plain(2, device))
    row = logits[0].cpu().numpy()
    assert drawn.tolist() == [engine_sample(row, SamplingParams(max_tokens=1, seed=1), at) for at in range(40)]
    assert len(set(drawn.tolist())) > 20


def test_min_p_leaves_what_is_near_enough_to_the_best_and_all_of_it(device: torch.device) -> None:
    row = torch.tensor([0.04, 0.5, 1.0, 0.05, 0.15, 0.26]).log() + 7
    cuts = Cuts(on(device, [0], torch.int32), on(device, [1.0]), on(device, [0.1]))
    drawn = sample_triton(
        row.to(device).expand(150, -1),
        torch.zeros(150, dtype=torch.int32, device=device),
        torch.arange(150, device=device),
        plain(1, device, cuts=cuts),
    )
    params = SamplingParams(max_tokens=1, seed=0, min_p=0.1)
    assert drawn.tolist() == [engine_sample(row.numpy(), params, at) for at in range(150)]
    assert set(drawn.tolist()) == {1, 2, 4, 5}


def test_ties_go_to_the_lowest_id_over_all_parts_of_a_row(device: torch.device) -> None:
    logits = torch.zeros(2, 20_000, device=device)
    logits[1, [9_000, 17_000, 19_999]] = 1
    tables = SamplingTables(on(device, [0.0, 0.0]), on(device, [1, 2], torch.int64))
    assert sample_triton(logits, on(device, [0, 1], torch.int32), on(device, [5, 5], torch.int64), tables).tolist() == [
        0,
        9_000,
    ]


def test_nan_is_never_drawn_and_where_nothing_may_be_drawn_it_is_token_0(device: torch.device) -> None:
    logits = torch.full((2, 100), torch.nan, device=device)
    logits[0, 40:] = -torch.inf
    logits[1, 77] = -1000
    cuts = Cuts(on(device, [3, 3], torch.int32), on(device, [0.5, 0.5]), on(device, [0.1, 0.1]))
    request, position = on(device, [0, 1], torch.int32), on(device, [5, 5], torch.int64)
    for tables in (plain(2, device), plain(2, device, cuts=cuts)):
        assert sample_triton(logits, request, position, tables).tolist() == [0, 77]


def test_a_bit_of_the_mask_is_a_token_and_what_lies_beyond_the_vocabulary_is_not_read(device: torch.device) -> None:
    width = 70
    logits = among_nan(torch.zeros(width, width).to(device))
    mask = torch.zeros(width, 3, dtype=torch.int32)
    for token in range(width):
        bit = 1 << token % 32
        mask[token, token // 32] = bit - (1 << 32 if bit >> 31 else 0)
    mask[:, 2] |= -(1 << 6)  # the bits beyond the vocabulary
    order = torch.arange(width, dtype=torch.int32, device=device)
    tables = plain(width, device, mask=mask.to(device))
    assert sample_triton(logits, order, order.long(), tables).tolist() == list(range(width))


def test_bias_stands_before_penalties_and_is_found_wherever_a_block_begins(device: torch.device) -> None:
    vocabulary = 3000
    ids = [0, 1, 1023, 1024, 2047, 2048, 2999]
    requests = [
        Sampled(
            SamplingParams(max_tokens=1, seed=1, temperature=0, logit_bias=((token, 7.0),), repetition_penalty=2.0),
            random_request(vocabulary, torch.Generator().manual_seed(0)).draw,
        )
        for token in ids
    ]
    logits = torch.full((len(ids), vocabulary), -1.0, device=device)
    tables = tables_of(requests, vocabulary, device)
    drawn = sample_triton(
        logits, torch.arange(len(ids), dtype=torch.int32, device=device), on(device, ids, torch.int64), tables
    ).tolist()
    expected = [engine_sample(logits[0].cpu().numpy(), one.params, 0, one.draw) for one in requests]
    assert drawn == expected


def test_a_token_of_the_prompt_alone_is_repeated_but_neither_frequent_nor_present(device: torch.device) -> None:
    """Four requests, each with one penalty or none; token 1 is in the prompt, 2 in the output, 3 in it three times."""
    history = torch.tensor([0, 1, 2, 7, 0, 0], dtype=torch.int32, device=device).repeat(4, 1)
    one, none = 1.0, 0.0
    penalties = Penalties(
        history,
        repetition=on(device, [one, 2.0, one, one]),
        frequency=on(device, [none, none, 1.0, none]),
        presence=on(device, [none, none, none, 1.0]),
    )
    tables = SamplingTables(on(device, [0.0] * 4), on(device, [0] * 4, torch.int64), penalties=penalties)
    request, position = on(device, [0, 1, 2, 3], torch.int32), on(device, [0] * 4, torch.int64)

    def likeliest(*row: float) -> list[int]:
        logits = torch.tensor([row] * 4, device=device)
        drawn = sample_triton(logits, request, position, tables)
        assert torch.equal(drawn, sample_reference(logits, request, position, tables))
        return drawn.tolist()

    assert likeliest(0, 4, 0, 0, 3.5, 0) == [1, 4, 1, 1]
    assert likeliest(0, 0, 4, 0, 3.5, 3.2) == [2, 4, 4, 4]
    assert likeliest(0, 0, 0, 4, 2.5, 0) == [3, 4, 4, 3]
    assert likeliest(-3, -4, -1.8, -1.6, -2.4, -2.7) == [3, 4, 4, 4]


def test_the_noise_of_the_reference_is_the_engines() -> None:
    ids = torch.arange(1000)
    for seed, position in ((0, 0), (1, 2), (2**63 - 1, 2**40)):
        np.testing.assert_allclose(
            gumbel_reference(seed, position, ids), gumbel(seed, position, ids.numpy()), rtol=1e-12
        )


def test_nothing_to_draw_is_nothing_drawn(device: torch.device) -> None:
    empty = torch.empty(0, dtype=torch.int64, device=device)
    assert sample_triton(torch.empty(0, 9, device=device), empty.int(), empty, plain(1, device)).tolist() == []


def test_where_there_is_no_gpu_the_plain_version_draws() -> None:
    logits, request = torch.randn(3, 50), torch.arange(3, dtype=torch.int32)
    drawn = sample(logits, request, torch.arange(3), plain(3, torch.device("cpu")))
    params = [SamplingParams(max_tokens=1, seed=seed) for seed in range(3)]
    assert drawn.tolist() == [engine_sample(logits[at].numpy(), params[at], at, ANYWHERE) for at in range(3)]


def test_disagreeing_arguments_are_refused() -> None:
    cpu = torch.device("cpu")
    logits, request, position = torch.zeros(2, 40), torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
    two, history = on(cpu, [1.0, 1.0]), torch.zeros(2, 40, dtype=torch.int32)
    ids = torch.zeros(2, 3, dtype=torch.int32)
    wrong = {
        "bias.values": plain(2, cpu, bias=Bias(ids, torch.zeros(2, 4).double())),
        "penalties.history": plain(2, cpu, penalties=Penalties(history[:, :39], two, two, two)),
        "penalties.presence": plain(2, cpu, penalties=Penalties(history, two, two, two[:1])),
        "mask": plain(2, cpu, mask=ids),
        "cuts.top_p": plain(2, cpu, cuts=Cuts(request, two[:1], two)),
        "seed": SamplingTables(two, position[:1]),
        "temperature": SamplingTables(two.float(), position),
        "penalties.repetition": plain(
            2, cpu, penalties=Penalties(history, history[:, 0].double()[:1].expand(2), two, two)
        ),
        "cuts.top_k": plain(2, cpu, cuts=Cuts(ids[:, 0], two, two)),
    }
    for name, tables in wrong.items():
        with pytest.raises(ShapeError, match=f"`{name}`"):
            sample(logits, request, position, tables)
    for refused in (logits.double(), logits[0], logits[:, :0]):
        with pytest.raises(ShapeError, match="`logits`"):
            sample(refused, request, position, plain(2, cpu))
    with pytest.raises(ShapeError, match="`request`"):
        sample(logits, request[:1], position, plain(2, cpu))
    with pytest.raises(ShapeError, match="`position`"):
        sample(logits, request, position[:1], plain(2, cpu))
