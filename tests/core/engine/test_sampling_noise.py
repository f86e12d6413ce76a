"""The noise of sampling: published vectors, what it depends on, and that draws follow the softmax."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.engine.sampling_reference import (
    EOS,
    draw,
    logits_of,
    philox,
    random_logits,
    reference_candidates,
    reference_noise,
    sampler_for,
)
from inferflux_core.engine.sampling import Sampler, gumbel_noise, philox_4x32
from inferflux_core.engine.types import SamplingParams, SequenceInit


def test_the_reference_knows_the_published_answers() -> None:
    """Random123's kat_vectors for philox4x32-10: the reference here is right, so it may judge the engine's."""
    ones = 0xFFFFFFFF
    assert philox((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox((ones,) * 4, (ones,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox(pi, (0xA4093822, 0x299F31D0)) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


def test_philox_answers_the_reachable_published_vector() -> None:
    words = philox_4x32(0, 0, np.array([0], dtype=np.uint64))
    assert [int(lane[0]) for lane in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=5))
@settings(max_examples=100, deadline=None)
def test_philox_is_the_reference_everywhere(seed: int, position: int, counters: list[int]) -> None:
    lanes = philox_4x32(seed, position, np.array(counters, dtype=np.uint64))
    found = [tuple(int(lane[i]) for lane in lanes) for i in range(len(counters))]
    assert found == [philox((c, position, 0, 0), (seed & 0xFFFFFFFF, seed >> 32)) for c in counters]


def test_noise_of_a_subset_is_the_subset_of_the_noise() -> None:
    everything = gumbel_noise(11, 5, np.arange(5000))
    for ids in ([0], [4999, 3, 3, 17], list(range(0, 5000, 7)), list(range(2500, 5000))):
        assert gumbel_noise(11, 5, np.array(ids)).tolist() == everything[ids].tolist()


def test_noise_depends_on_seed_position_and_token() -> None:
    ids = np.arange(64)
    noises = [gumbel_noise(seed, position, ids) for seed in (0, 1, 2**32, 2**63) for position in (0, 1, 500)]
    values = np.concatenate(noises)
    assert len(np.unique(values)) > 0.999 * len(values)


def test_noise_is_the_reference_and_finite_at_its_ends() -> None:
    ids = np.arange(3000)
    noise = gumbel_noise(42, 9, ids)
    assert noise.dtype == np.float32
    assert np.allclose(noise, [reference_noise(42, 9, int(t)) for t in ids], rtol=1e-4, atol=1e-5)


def test_noise_at_the_extreme_words_is_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    def extreme(seed: int, position: int, counters: Any) -> list[Any]:
        return [np.full(len(counters), word, dtype=np.uint64) for word in (0, 1, 2**32 - 2, 2**32 - 1)]

    monkeypatch.setattr("inferflux_core.engine.sampling.philox_4x32", extreme)
    noise = gumbel_noise(0, 0, np.arange(4))
    assert np.isfinite(noise).all()
    assert noise[0] == pytest.approx(-math.log(-math.log1p(-(2**-33))), rel=1e-6)
    assert noise[0] > noise[1] > noise[2] >= noise[3]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    """Chi-square over 4,000 fixed seeds, at the 0.999 quantile of 7 degrees of freedom."""
    logits = logits_of(0.0, 1.0, -1.0, 0.5, 2.0, -0.5, 1.5, 0.2)
    expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    count = 4000
    found = Counter(draw(logits, temperature=temperature, seed=seed) for seed in range(count))
    chi_square = sum((found[t] - count * p) ** 2 / (count * p) for t, p in enumerate(expected))
    assert chi_square < 24.3


def test_draws_along_one_sequence_follow_the_softmax() -> None:
    logits = logits_of(0.0, 1.0, -1.0, 0.5)
    sampler = sampler_for(SamplingParams(max_tokens=10**6, seed=5), 4, eos=())
    count = 4000
    found = Counter(sampler.sample(0, position, logits)[0] for position in range(1, count + 1))
    expected = np.exp(logits) / np.exp(logits).sum()
    assert sum((found[t] - count * p) ** 2 / (count * p) for t, p in enumerate(expected)) < 16.3  # 3 degrees of freedom


def test_filters_do_not_change_the_draw_among_survivors() -> None:
    """Noise is keyed by token: where the plain draw survives a filter, the filtered draw is the same."""
    same = 0
    for seed in range(200):
        logits = random_logits(seed, 500)
        plain = draw(logits, seed=seed)
        params = SamplingParams(max_tokens=1, top_k=40, top_p=0.9)
        if plain in reference_candidates(logits.tolist(), params):
            same += 1
            assert draw(logits, seed=seed, top_k=40, top_p=0.9) == plain
    assert same > 100


def test_a_seed_draws_the_same_whatever_else_is_sampled() -> None:
    params = SamplingParams(max_tokens=99, seed=2**63 + 1, frequency_penalty=0.5)
    alone = Sampler(300, frozenset({EOS}))
    alone.start(SequenceInit(0, params, [1, 2], 2))
    crowd = Sampler(300, frozenset({EOS}))
    for slot in range(5):
        crowd.start(SequenceInit(slot, params if slot == 3 else SamplingParams(max_tokens=99, seed=slot), [1, 2], 2))
    for position in range(2, 30):
        logits = random_logits(position, 300)
        for slot in (4, 0, 1):
            crowd.sample(slot, position, random_logits(1000 + position, 300))
        assert crowd.sample(3, position, logits)[0] == alone.sample(0, position, logits)[0]
