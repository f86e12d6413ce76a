"""Noise: its words are the reference's bit for bit, on every path, and its bounds hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the torch backend's tests need torch")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inferflux_backend_torch import philox
from inferflux_core.engine import sampling

seeds = st.integers(0, 2**64 - 1)
positions = st.integers(0, 2**32 - 1)
ids = st.integers(0, 2**31 - 1)


def signed(seed: int) -> int:
    return seed - 2**64 if seed >= 2**63 else seed


def columns(keys: list[philox.Words64]) -> philox.Words64:
    return np.stack(keys, axis=1)


@given(st.lists(st.tuples(seeds, positions), min_size=1, max_size=4), st.lists(ids, min_size=1, max_size=5))
@settings(max_examples=200, deadline=None)
def test_words_are_the_references(sequences: list[tuple[int, int]], groups: list[int]) -> None:
    words = philox.philox_words(
        torch.tensor([signed(seed) for seed, _ in sequences]),
        torch.tensor([position for _, position in sequences]),
        torch.tensor(groups),
    )
    counters = np.array(groups, dtype=np.uint64)
    for row, (seed, position) in zip(words, sequences, strict=True):
        expected = np.stack(sampling.philox_4x32(seed, position, counters), axis=1)
        assert row.tolist() == expected.tolist()
        keys = philox.round_keys(seed)[:, np.newaxis]
        upper, lower = philox.philox_pairs(keys, np.array([position], dtype=np.uint64), counters)
        pairs = [[int(w) >> 32, int(w) & 0xFFFFFFFF] for pair in zip(upper, lower, strict=True) for w in pair]
        assert np.array(pairs).reshape(-1, 4).tolist() == expected.tolist()


def test_words_are_the_published_ones() -> None:
    """Random123's kat_vectors for philox4x32-10, the one whose counter is reachable."""
    zero = torch.zeros(1, dtype=torch.int64)
    expected = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox.philox_words(zero, zero, zero).flatten().tolist() == expected


@given(st.lists(st.tuples(seeds, positions, ids), min_size=1, max_size=30))
@settings(max_examples=100, deadline=None)
def test_noise_of_tokens_of_many_sequences_is_the_references_bit_for_bit(draws: list[tuple[int, int, int]]) -> None:
    noise = philox.noise_of_tokens(
        columns([philox.round_keys(seed) for seed, _, _ in draws]),
        np.array([position for _, position, _ in draws], dtype=np.uint64),
        np.array([token for _, _, token in draws]),
    )
    expected = [sampling.gumbel_noise(seed, position, np.array([token])) for seed, position, token in draws]
    assert noise.tolist() == np.concatenate(expected).tolist()


@given(seeds, positions, st.integers(1, 3000))
@settings(max_examples=50, deadline=None)
def test_noise_of_groups_is_the_references_bit_for_bit(seed: int, position: int, count: int) -> None:
    noise = philox.noise_of_groups(philox.round_keys(seed), position, np.arange(count, dtype=np.uint64))
    assert noise.dtype == np.float32
    assert noise.tolist() == sampling.gumbel_noise(seed, position, np.arange(4 * count)).tolist()


def test_noise_of_the_device_differs_by_rounding_only() -> None:
    expected = sampling.gumbel_noise(2**63 + 5, 17, np.arange(40_000))
    noise = philox.device_noise(torch.tensor([3, signed(2**63 + 5)]), torch.tensor([9, 17]), torch.arange(10_000))
    assert noise.shape == (2, 40_000)
    assert noise.dtype == torch.float32
    assert np.allclose(noise[1].numpy(), expected, rtol=1e-6, atol=1e-6)


def test_noise_of_the_extreme_words_is_the_references_and_within_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    words = (0, 1, 2**32 - 2, 2**32 - 1)

    def extreme(seed: int, position: int, counters: Any) -> list[Any]:
        return [np.full(len(counters), word, dtype=np.uint64) for word in words]

    def extreme_pairs(keys: Any, positions: Any, groups: Any) -> tuple[Any, Any]:
        first, second, third, fourth = extreme(0, 0, groups)
        return (first << np.uint64(32)) | second, (third << np.uint64(32)) | fourth

    monkeypatch.setattr(sampling, "philox_4x32", extreme)
    monkeypatch.setattr(philox, "philox_pairs", extreme_pairs)
    monkeypatch.setattr(philox, "philox_words", lambda seeds, positions, groups: torch.tensor(words).expand(1, 1, 4))
    expected = sampling.gumbel_noise(0, 0, np.arange(4))
    assert expected[0] == expected.max() == pytest.approx(philox.MOST_NOISE, abs=1e-5)
    assert expected[3] == expected.min() == pytest.approx(philox.LEAST_NOISE, abs=1e-5)
    keys = philox.round_keys(0)
    group = np.zeros(1, dtype=np.uint64)
    assert philox.noise_of_groups(keys, 0, group).tolist() == expected.tolist()
    assert philox.noise_of_tokens(keys[:, np.newaxis], group, np.arange(4)).tolist() == expected.tolist()
    zero = torch.zeros(1, dtype=torch.int64)
    assert philox.device_noise(zero, zero, zero)[0].numpy() == pytest.approx(expected, rel=1e-6)
