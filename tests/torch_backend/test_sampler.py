"""The device sampler against core's reference: every parameter, in batches, by numpy and by plain torch operations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace as replace_fields
from typing import Any

import msgspec
import numpy as np
import pytest

pytest.importorskip("torch", reason="the torch backend's tests need torch")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from inferflux_backend_torch import device_draw, host_draw
from inferflux_backend_torch.philox import noise_of_groups
from inferflux_backend_torch.sampler import DeviceSampler
from inferflux_core.engine.sampling import Logits, Sampler, gumbel_noise
from inferflux_core.engine.types import SequenceInit
from torch_backend.sampler_case import (
    CPU,
    EOS,
    INF,
    SIZES,
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

# --- against the reference --------------------------------------------------------------------------------------------


def near_tie(init: SequenceInit, size: int, logits: Logits, position: int, token: int, expected: int) -> bool:
    """Whether rounding may prefer one token to the other: their noisy scores are equal to 1e-5, or a filter's limit is at one.

    A filter's limit is at one if moving the limit by a millionth makes the reference draw that token.
    """
    params = init.params
    sampler = Sampler(size, frozenset({EOS}))
    sampler.start(replace_fields(init, slot=0))
    adjusted = sampler._adjust(sampler._sequences[0], logits).astype(np.float64)
    if params.temperature >= 1e-5:
        pair = np.array([token, expected])
        scores = adjusted[pair] / params.temperature + gumbel_noise(params.seed, position, pair)
        if abs(scores[0] - scores[1]) <= 1e-5 * max(1.0, abs(scores[0]), abs(adjusted[pair] / params.temperature).max()):
            return True
    for factor in (1 - 1e-6, 1 + 1e-6):
        moved = msgspec.structs.replace(params, top_p=params.top_p * factor, min_p=params.min_p * factor)
        if reference_draw(replace_fields(init, params=moved), size, logits, position)[0] == token:
            return True
    return False


@st.composite
def sequences(draw: st.DrawFn, size: int, slot: int) -> SequenceInit:
    tokens = st.integers(0, size - 1)
    greedy = draw(st.sampled_from([False, False, True]))
    off = draw(st.sampled_from([{"top"}, {"penalty"}, {"ban"}, {"top", "penalty", "ban"}, set()]))
    values: dict[str, Any] = {"temperature": 0.0 if greedy else draw(st.sampled_from([0.2, 0.7, 1.0, 1.0, 2.5]))}
    if "top" not in off:
        values |= {
            "top_k": draw(st.sampled_from([0, 0, 1, 5, 50, 3000, 10**6])),
            "top_p": draw(st.sampled_from([1.0, 0.95, 0.5, 0.9999, 0.0])),
            "min_p": draw(st.sampled_from([0.0, 0.0, 0.04, 1.0])),
        }
    if "penalty" not in off:
        values |= {
            "repetition_penalty": draw(st.sampled_from([1.0, 1.3, 0.7])),
            "frequency_penalty": draw(st.sampled_from([0.0, 0.41, -1.1])),
            "presence_penalty": draw(st.sampled_from([0.0, 0.87, -0.33])),
        }
    if "ban" not in off:
        values |= {
            "min_tokens": draw(st.integers(0, 4)),
            "ignore_eos": draw(st.booleans()),
            "stop_token_ids": frozenset(draw(st.lists(tokens, max_size=2))),
            "logit_bias": draw(st.dictionaries(tokens, st.sampled_from([-100.0, -1.1, 2.3]), max_size=3)),
        }
    params = params_of(seed=draw(st.integers(0, 2**64 - 1)), logprobs=draw(st.sampled_from([None, None, 0, 3])), **values)
    prompt = draw(st.lists(tokens, min_size=1, max_size=6))
    output = draw(st.lists(tokens, max_size=4))
    return SequenceInit(slot, params, prompt + output, len(prompt))


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[SequenceInit], list[Tensor]]:
    """Sequences in slots of any order, and logits of three steps."""
    size = draw(st.sampled_from(SIZES))
    slots = draw(st.lists(st.integers(0, 63), min_size=1, max_size=6, unique=True))
    spread = draw(st.sampled_from([0.1, 3.0, 8.0]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    seed = draw(st.integers(0, 2**31))
    logits = [random_logits(seed + step, len(slots) * size, spread).reshape(len(slots), size) for step in range(3)]
    return [draw(sequences(size, slot)) for slot in slots], [torch.from_numpy(values).to(dtype) for values in logits]


def check_steps(make: Make, inits: list[SequenceInit], logits: list[Tensor], exact: bool) -> None:
    size = logits[0].shape[1]
    sampler = make(size)
    reference = Sampler(size, frozenset({EOS}))
    for init in inits:
        sampler.start(init)
        reference.start(init)
    alive = list(inits)
    tokens = {init.slot: list(init.tokens) for init in inits}
    for step in logits:
        samples = sampler.sample(step, [init.slot for init in inits], [len(tokens[init.slot]) for init in inits])
        drawn, logprobs = samples.collect()
        for row, init in enumerate(inits):
            slot, position = init.slot, len(tokens[init.slot])
            if init in alive:
                values = step[row].float().numpy()
                expected, expected_logprobs = reference.sample(slot, position, values)
                if drawn[row] != expected:
                    now = SequenceInit(slot, init.params, tokens[slot], init.num_prompt_tokens)
                    assert not exact, f"drew {drawn[row]}, the reference {expected}, with {now}"
                    assert near_tie(now, size, values, position, drawn[row], expected), f"{drawn[row]} != {expected}: {now}"
                    alive.remove(init)  # from here on the two histories differ
                else:
                    check_logprobs(logprobs[row], expected_logprobs)
            tokens[slot].append(drawn[row])


@given(steps())
@settings(max_examples=200, deadline=None)
def test_on_the_host_every_draw_is_the_references(case: tuple[list[SequenceInit], list[Tensor]]) -> None:
    check_steps(host_sampler, *case, exact=True)


@given(steps())
@settings(max_examples=100, deadline=None)
def test_on_a_device_every_draw_is_the_references_up_to_rounding(case: tuple[list[SequenceInit], list[Tensor]]) -> None:
    check_steps(device_sampler, *case, exact=False)


@both
@pytest.mark.parametrize(
    ("logits", "params"),
    [
        ([1, 5, 2, 5], {"temperature": 0.0}),
        ([-0.0, 0.0, -1, -1], {"temperature": 0.0}),
        ([-1, -0.5, -0.5, -2], {"temperature": 0.0}),
        ([1.0, 2.0, 1.0, 0.9], {"top_k": 2}),
        ([1, 1, 1, 1], {"top_k": 1}),
        ([2, 1, 1, -20], {"top_p": 0.6}),
        ([1, 1, 1, 1], {"top_p": 0.5}),
        ([1, 1, 1, 1], {"top_p": 0.01}),
        (np.log([0.4, 0.3, 0.2, 0.1]), {"top_p": 0.56, "top_k": 2}),
        (np.log([0.5, 0.3, 0.15, 0.05]), {"top_p": 0.79}),
        (np.log([0.6, 0.31, 0.05, 0.04]), {"min_p": 0.0834}),
        ([0, 0, -3, -3], {"min_p": 1.0}),
        (np.linspace(0, -0.5, 2000), {"top_p": 0.5}),
        (np.linspace(0, -0.5, 2000), {"top_k": 1500, "top_p": 0.3}),
        (np.linspace(0, -20, 2000), {"top_k": 1500, "min_p": 1e-7}),
        (np.linspace(0, -20, 2000), {"top_k": 900, "temperature": 1e6}),
        (np.repeat([0.0, -9.0, -50.0], [3, 40, 20]), {"top_k": 20}),
        (np.repeat([0.0, -9.0, -50.0], [3, 40, 20]), {"top_p": 0.99999}),
        # After the subtraction the tokens just out of the first look's reach are equal to the second most likely one.
        ([12.0, 0.0, *[-1e-9] * 3000], {"top_k": 2, "top_p": 0.7, "temperature": 1.5}),
        ([-INF, 1.0, -INF, 1.0], {"top_k": 3, "top_p": 0.9, "min_p": 0.1}),
        ([3e38, -3e38, 0, 2.9e38], {"top_k": 2}),
        ([3e38, 2.9e38, 2.9e38, -3e38], {"temperature": 1e37}),
        ([1.0, 1.0, 1.00001, -5], {"temperature": 1e-5}),
    ],
)
def test_the_edges_of_every_filter(make: Make, logits: Any, params: dict[str, Any]) -> None:
    row = np.asarray(logits, dtype=np.float32)
    inits = seeded(60, **params)
    found = draws(make, torch.from_numpy(row).expand(60, -1).contiguous(), inits)
    assert found == [reference_draw(init, len(row), row, 7)[0] for init in inits]


@pytest.mark.parametrize("size", SIZES[:3])
@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_thresholds_without_sorting_are_those_of_sorting(size: int, spread: float) -> None:
    row = random_logits(size, size, spread)
    scaled = row - row.max()
    scaled[size // 2] = np.nextafter(scaled[size // 3], np.float32(-1))
    scaled[-1] = -INF
    descending = np.sort(scaled)[::-1]

    def thresholds(top_k: Sequence[int], top_p: Sequence[float], min_p: Sequence[float]) -> list[float]:
        return device_draw.filter_thresholds(
            torch.from_numpy(scaled).expand(len(top_k), -1).contiguous(),
            torch.tensor(top_k),
            torch.tensor(top_p, dtype=torch.float64),
            torch.tensor(min_p).log(),
        ).tolist()

    limits = [*range(1, min(size, 60)), size - 1, size]
    off = [1.0] * len(limits), [0.0] * len(limits)
    assert thresholds(limits, *off) == [descending[k - 1] for k in limits]
    masses = [0.0, 0.1, 0.5, 0.9, 0.999, 1.0]
    expected = [Sampler._top_p_threshold(scaled, p) for p in masses[:-1]]
    assert thresholds([size] * 6, masses, [0.0] * 6) == [*expected, -INF]
    first = Sampler._top_p_threshold(descending[:5], 0.8)
    assert thresholds([5, 5], [0.8, 0.8], [0.0, 1.0]) == [first, 0.0]


def test_improbable_tokens_are_kept_without_filters() -> None:
    limits = device_draw.filter_thresholds(
        torch.tensor([[0.0, -200.0]]), torch.tensor([2]), torch.ones(1, dtype=torch.float64), torch.tensor([-INF])
    )
    assert limits.tolist() == [-200.0]


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("filters", [{}, {"top_k": 2, "top_p": 0.9, "min_p": 0.01}])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "broken",
    [
        [math.nan, -40.0, 1.0, math.nan, 0.5],
        [-math.nan, -40.0, -1.0, -math.nan, -0.5],
        [50.0, INF, math.nan, 1.0, INF],
        [math.nan] * 5,
        [-INF] * 5,
        [-INF, -INF, 0.0, -INF, -INF],
    ],
)
def test_a_broken_row_is_drawn_from_as_in_the_reference(
    make: Make, dtype: torch.dtype, filters: dict[str, Any], temperature: float, broken: list[float]
) -> None:
    """And the rows beside it are none the worse for it."""
    sound = [0.0, 1.0, 2.0, -1.0, 0.5]
    inits = seeded(40, temperature=temperature, logprobs=2, **filters)
    logits = torch.tensor([broken, sound] * 20).to(dtype)
    sampler = make(5)
    for init in inits:
        sampler.start(init)
    tokens, logprobs = sampler.sample(logits, range(40), [7] * 40).collect()
    for row, init in enumerate(inits):
        expected, entry = reference_draw(init, 5, logits[row].float().numpy(), 7)
        assert tokens[row] == expected
        check_logprobs(logprobs[row], entry)


@both
def test_bans_that_leave_nothing_do_no_harm(make: Make) -> None:
    inits = seeded(20, min_tokens=5, stop_token_ids=frozenset(range(4)))
    row = np.array([1, 2, 3, 4], dtype=np.float32)
    found = draws(make, torch.from_numpy(row).expand(20, -1).contiguous(), inits)
    assert found == [reference_draw(init, 4, row, 7)[0] for init in inits]
    assert set(found) == {0, 1, 2, 3}


@both
def test_token_ids_beyond_the_vocabulary_change_nothing(make: Make) -> None:
    params = params_of(temperature=0.0, min_tokens=3, stop_token_ids=frozenset({99, -1}), logit_bias={77: 5.0, 1: 1.0})
    sampler = DeviceSampler(4, frozenset({3, 50}), 2, CPU) if make is host_sampler else device_sampler(4, (3, 50))
    sampler.start(SequenceInit(0, params, [0], 1))
    assert sampler.sample(torch.tensor([[1.5, 1.0, 0.0, 9.0]]), [0], [1]).collect()[0] == [1]


# --- the noise that is never computed ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4099, 49152])
@pytest.mark.parametrize("temperature", [0.2, 0.5, 0.7, 1.0, 1.6])
@pytest.mark.parametrize("spread", [1.0, 3.5])
def test_leaving_noise_out_changes_no_draw(size: int, temperature: float, spread: float) -> None:
    logits = np.sort(random_logits(size, size, spread))[::-1].copy()
    logits[np.random.default_rng(1).integers(0, size, 5)] += 6 * spread
    count = 12
    found = draws(host_sampler, torch.from_numpy(logits).expand(count, -1), seeded(count, temperature=temperature))
    scaled = (logits - logits.max()) / np.float32(temperature)
    assert found == [int((scaled + gumbel_noise(1000 * i + 7, 7, np.arange(size))).argmax()) for i in range(count)]


@pytest.mark.parametrize(("margin", "unlikely_wins"), [(0.001, True), (-0.001, False)])
def test_a_token_too_unlikely_to_be_looked_at_first_may_win(margin: float, unlikely_wins: bool) -> None:
    """The luckiest token of the vocabulary, at exactly the distance that its noise makes up for."""
    size, position = 49152, 7
    distances = []
    for init in seeded(10):
        noise = gumbel_noise(init.params.seed, position, np.arange(size))
        lucky = int(noise.argmax())
        likely = (lucky + 1000) % size
        logits = np.full(size, -60.0, dtype=np.float32)
        logits[likely] = 0.0
        logits[lucky] = noise[likely] - noise[lucky] + margin
        distances.append(-float(logits[lucky]))
        assert draws(host_sampler, torch.from_numpy(logits)[None], [init]) == [lucky if unlikely_wins else likely]
    assert max(distances) > 8, "else the test proves nothing"


def test_noise_is_computed_for_few_tokens_of_a_peaked_row(monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[int] = []

    def counting(keys: Any, position: int, group_ids: Any) -> Logits:
        groups.append(len(group_ids))
        return noise_of_groups(keys, position, group_ids)

    monkeypatch.setattr(host_draw, "noise_of_groups", counting)
    logits = random_logits(5, 49152)
    logits[17] += 20.0
    rows = torch.from_numpy(logits).expand(8, -1)
    draws(host_sampler, rows, seeded(8, temperature=0.5))
    everything = 8 * 49152 // 4
    assert 0 < sum(groups) < everything / 4
    groups.clear()
    draws(host_sampler, rows, seeded(8, temperature=0.05))
    draws(host_sampler, rows, seeded(8, temperature=0.7, top_k=50, top_p=0.9))
    assert groups == [], "the likely tokens decided it"
