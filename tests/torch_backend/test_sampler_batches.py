"""The device sampler over batches and steps: company, history, logprobs, and what a device must not be asked."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("torch", reason="the torch backend's tests need torch")

import torch
from torch import Tensor

from inferflux_backend_torch import device_draw
from inferflux_backend_torch.device_draw import DeviceDraw
from inferflux_backend_torch.sampler import DeviceSampler, Samples
from inferflux_core.engine.types import SequenceInit, TokenLogprobs
from torch_backend.sampler_case import (
    CPU,
    EOS,
    Make,
    both,
    check_logprobs,
    device_sampler,
    draws,
    host_sampler,
    params_of,
    random_logits,
    reference_draw,
    seeded,
)

# --- company and history ----------------------------------------------------------------------------------------------


MIXED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.0, "ignore_eos": True},
    {"top_p": 0.8, "top_k": 30},
    {"frequency_penalty": 0.7, "repetition_penalty": 1.2, "logprobs": 2},
    {"temperature": 0.6, "min_tokens": 3, "logit_bias": {5: 2.0, 9: -3.0}},
    {"temperature": 0.0, "presence_penalty": 1.5, "logprobs": 0},
    {"min_p": 0.1, "ignore_eos": True, "stop_token_ids": frozenset({8})},
]


def run(make: Make, rows: Sequence[int], steps: int) -> list[list[tuple[int, TokenLogprobs | None]]]:
    """Token and logprobs of each step for these rows of MIXED, in one batch."""
    sampler = make(300)
    for row in rows:
        sampler.start(SequenceInit(row, params_of(seed=row, **MIXED[row]), [1, 2, 5, 5], 4))
    found = []
    for step in range(steps):
        logits = torch.stack([torch.from_numpy(random_logits(100 * row + step, 300)) for row in rows])
        tokens, logprobs = sampler.sample(logits, rows, [4 + step] * len(rows)).collect()
        found.append(list(zip(tokens, logprobs, strict=True)))
    return [list(column) for column in zip(*found, strict=True)]


@both
def test_a_row_draws_the_same_in_any_company(make: Make) -> None:
    everyone = run(make, range(8), 12)
    assert run(make, [7, 2, 5], 12) == [everyone[row] for row in (7, 2, 5)]
    for row in range(8):
        assert run(make, [row], 12) == [everyone[row]]


@both
@pytest.mark.parametrize("row", range(8))
def test_a_resumed_sequence_goes_on_as_if_never_preempted(make: Make, row: int) -> None:
    straight = [token for token, _ in run(make, [row], 12)[0]]
    for cut in (1, 5):
        sampler = make(300)
        params = params_of(seed=row, **MIXED[row])
        sampler.start(SequenceInit(9, params, [1, 2, 5, 5, *straight[:cut]], 4))
        for step in range(cut, 12):
            logits = torch.from_numpy(random_logits(100 * row + step, 300))[None]
            assert sampler.sample(logits, [9], [4 + step]).collect()[0] == [straight[step]]


@both
def test_a_step_may_be_drawn_before_the_last_one_is_collected(make: Make) -> None:
    sampler = make(4)
    sampler.start(SequenceInit(0, params_of(temperature=0.0, presence_penalty=5.0), [0], 1))
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    samples = [sampler.sample(logits, [0], [position]) for position in range(1, 5)]
    assert [one.collect()[0][0] for one in reversed(samples)] == [3, 2, 1, 0]


@both
def test_slots_are_begun_anew_and_freed(make: Make) -> None:
    """More sequences with penalties than the table of counts begins with, each in a slot and a row that others had before."""
    sampler = make(4)
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    penalised = params_of(temperature=0.0, presence_penalty=5.0)
    for slot, step in itertools.product(range(11), range(2)):
        if step == 0:
            sampler.start(SequenceInit(slot, penalised, [0], 1))
        assert sampler.sample(logits, [slot], [1 + step]).collect()[0] == [step]
    for slot in (3, 4, 5):
        sampler.free(slot)
        sampler.start(SequenceInit(slot + 20, penalised, [0], 1))
    found = sampler.sample(logits.expand(11, -1), [0, 1, 2, 23, 24, 25, 6, 7, 8, 9, 10], [3] * 11).collect()[0]
    assert found == [2, 2, 2, 0, 0, 0, 2, 2, 2, 2, 2]
    sampler.start(SequenceInit(6, params_of(temperature=0.0), [1], 1))
    assert sampler.sample(logits, [6], [1]).collect()[0] == [0]
    sampler.free(6)
    with pytest.raises(KeyError):
        sampler.sample(logits, [6], [1])


@both
def test_counts_of_freed_sequences_are_used_again(make: Make) -> None:
    sampler = make(4)
    for slot in range(50):
        sampler.start(SequenceInit(slot, params_of(presence_penalty=5.0), [0], 1))
        sampler.free(slot)
    assert len(sampler._penalties._counts) == 4, "or a server would grow with every request"


@both
def test_no_rows_are_no_tokens(make: Make) -> None:
    assert make(4).sample(torch.empty(0, 4), [], []).collect() == ([], [])


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_left_as_they_were(make: Make, dtype: torch.dtype) -> None:
    logits = torch.stack([torch.from_numpy(random_logits(row, 300)) for row in range(8)]).to(dtype)
    logits[7, EOS] = math.nan
    before = logits.clone()
    sampler = make(300)
    for row, params in enumerate(MIXED):
        sampler.start(SequenceInit(row, params_of(seed=row, **params), [1, 2], 2))
    sampler.sample(logits, range(8), [2] * 8)
    assert torch.equal(logits.nan_to_num(nan=-1e4), before.nan_to_num(nan=-1e4))


# --- logprobs ---------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[0], [1, None, 4], [20, 3], [300, None]])
def test_logprobs_are_the_references(make: Make, dtype: torch.dtype, counts: list[int | None]) -> None:
    """Of logits rounded to a few values, so that equals abound."""
    sampler = make(300)
    logits = torch.stack([torch.from_numpy(random_logits(row, 300)).round() for row in range(len(counts))]).to(dtype)
    inits = [SequenceInit(row, params_of(logprobs=count, seed=row), [1], 1) for row, count in enumerate(counts)]
    for init in inits:
        sampler.start(init)
    tokens, found = sampler.sample(logits, range(len(counts)), [1] * len(counts)).collect()
    for row, init in enumerate(inits):
        token, expected = reference_draw(init, 300, logits[row].float().numpy(), 1)
        assert tokens[row] == token
        check_logprobs(found[row], expected)


@both
def test_a_greedily_drawn_token_is_the_first_alternative(make: Make) -> None:
    sampler = make(300)
    sampler.start(SequenceInit(0, params_of(temperature=0.0, logprobs=5), [1], 1))
    logits = torch.zeros(1, 300)
    logits[0, [250, 20, 130]] = 1.0
    tokens, entries = sampler.sample(logits, [0], [1]).collect()
    assert tokens == [20]
    assert entries[0] is not None
    assert [token for token, _ in entries[0].top] == [20, 130, 250, 0, 1]
    assert entries[0].top[0][1] == entries[0].logprob


# --- what a device must not be asked ----------------------------------------------------------------------------------


def test_sampling_never_waits_for_the_device() -> None:
    """Tensors of the meta device hold no numbers: whatever would ask for one fails."""
    meta = torch.device("meta")
    sampler = DeviceSampler(300, frozenset({EOS}), 8, meta)
    for row, params in enumerate(MIXED):
        sampler.start(SequenceInit(row, params_of(seed=row, **params), [1, 2, 5], 2))
    samples = sampler.sample(torch.empty(8, 300, device=meta, dtype=torch.bfloat16), range(8), [3] * 8)
    assert isinstance(samples, Samples)
    assert samples.token_ids.shape == (8,)
    assert samples.token_ids.dtype == torch.int64


def test_only_rows_that_ask_are_filtered_and_drawn() -> None:
    asked: list[tuple[str, int]] = []

    def thresholds(scaled: Tensor, top_k: Tensor, top_p: Tensor, log_min_p: Tensor) -> Tensor:
        asked.append(("filter", len(scaled)))
        return device_draw.filter_thresholds(scaled, top_k, top_p, log_min_p)

    def winners(scaled: Tensor, limits: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
        asked.append(("draw", len(scaled)))
        return device_draw.gumbel_argmax(scaled, limits, seeds, positions)

    sampler = DeviceSampler(300, frozenset({EOS}), 8, CPU, DeviceDraw(300, 8, CPU, thresholds, winners))
    for row, params in enumerate(MIXED):
        sampler.start(SequenceInit(row, params_of(seed=row, **params), [1, 2], 2))
    logits = torch.stack([torch.from_numpy(random_logits(row, 300)) for row in range(8)])
    sampler.sample(logits, range(8), [2] * 8)
    assert asked == [("filter", 2), ("draw", 3), ("draw", 2)]
    asked.clear()
    sampler.sample(logits[:1], [0], [2])
    assert asked == []


@both
def test_of_a_row_with_drafts_what_counts_is_drawn_one_by_one(make: Make) -> None:
    """Up to the first draft that is not drawn; on the host nothing behind it is even looked at."""
    drawing = {"temperature": 1.0, "seed": 5, "logprobs": 2}
    inits = [SequenceInit(slot, params_of(**params), [0] * 4, 4) for slot, params in enumerate((drawing, {"temperature": 0.0}))]
    logits = torch.stack([torch.from_numpy(random_logits(seed, 101)) for seed in range(7)])
    slots, positions = [0, 0, 0, 0, 0, 1, 1], [4, 5, 6, 7, 8, 4, 5]
    sampler = make(101)
    for init in inits:
        sampler.start(init)
    expected, entries = zip(
        *(reference_draw(inits[slot], 101, row.numpy(), at) for row, slot, at in zip(logits, slots, positions, strict=True)),
        strict=True,
    )
    drafts = {0: expected[0], 1: expected[1], 2: expected[2] ^ 1, 3: expected[3], 5: expected[5]}
    tokens, found = sampler.sample(logits, slots, positions, drafts=drafts).collect()
    for row in (0, 1, 2, 5, 6):
        assert tokens[row] == expected[row]
        check_logprobs(found[row], entries[row])
    if make is host_sampler:
        assert (tokens[3:5], found[3:5]) == ([-1, -1], [None, None])


def test_noise_in_pieces_is_noise_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.stack([torch.from_numpy(random_logits(row, 4099, 0.5)) for row in range(5)])
    whole = draws(device_sampler, rows, seeded(5))
    monkeypatch.setattr(device_draw, "_GROUPS_AT_ONCE", 5 * 100)
    assert draws(device_sampler, rows, seeded(5)) == whole
    assert max(whole) > 400, "else only the first piece counted"
    monkeypatch.setattr(device_draw, "device_noise", lambda seeds, p, groups: torch.zeros(len(seeds), 4 * len(groups)))
    assert draws(device_sampler, torch.zeros(5, 4099), seeded(5)) == [0] * 5, "of equals the first"
