"""Masks and drafts in the reference sampler: nothing leaves a mask, and a draft draws what would be drawn without it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.engine.sampling_reference import (
    EOS,
    INF,
    logits_of,
    mask_of,
    random_logits,
    reference_draw,
    reference_masked,
    sampler_for,
)
from inferflux_core.engine.sampling import Logits, Sampler, permitted_ids
from inferflux_core.engine.types import SamplingParams, SequenceInit, TokenLogprobs

SIZES = st.sampled_from([5, 33, 64, 70, 5000])
# Always the same cases: rounding decides one of a hundred thousand in another way than the reference.
EXACT = settings(max_examples=150, deadline=None, derandomize=True)
FILTERS = st.fixed_dictionaries(
    {},
    optional={
        "top_k": st.sampled_from([1, 3, 40]),
        "top_p": st.sampled_from([0.3, 0.9]),
        "min_p": st.sampled_from([0.05, 0.5]),
        "min_tokens": st.integers(0, 5),
        "ignore_eos": st.just(True),
        "logprobs": st.integers(0, 3),
        "stop_token_ids": st.just(frozenset({1, 2})),
        "logit_bias": st.just({0: 3.0, 4: -100.0}),
    },
)


@st.composite
def masks_of(drawer: st.DrawFn, size: int) -> list[int]:
    """Tokens of a mask: one, few or nearly all."""
    kind = drawer(st.sampled_from(["one", "few", "most"]))
    rng = np.random.default_rng(drawer(st.integers(0, 2**32)))
    count = {"one": 1, "few": min(size, 4), "most": max(1, size - 3)}[kind]
    return sorted(rng.choice(size, count, replace=False).tolist())


def drawn(logits: Logits, among: list[int], **params: Any) -> int:
    sampler = sampler_for(SamplingParams(**{"max_tokens": 100, **params}), len(logits))
    return sampler.sample(0, 7, logits, mask_of(among, len(logits)))[0]


@given(st.data(), st.sampled_from([5, 33, 64, 70, 600]), st.sampled_from([0.0, 0.7, 1.3]), FILTERS, st.integers(0, 2**32))
@EXACT
def test_a_masked_draw_is_the_reference(
    data: st.DataObject, size: int, temperature: float, options: dict[str, Any], seed: int
) -> None:
    among = data.draw(masks_of(size))
    logits = random_logits(seed, size)
    params = SamplingParams(max_tokens=9, temperature=temperature, seed=seed, **options)
    output = [1] * data.draw(st.integers(0, 6))
    masked = reference_masked(logits.tolist(), among, params, len(output), [EOS])
    biased = [value + params.logit_bias.get(t, 0.0) for t, value in enumerate(masked)]
    sampler = sampler_for(params, size, output=output)
    token, entry = sampler.sample(0, 7, logits, mask_of(among, size))
    assert token in among
    assert token == reference_draw(biased, params, 7)
    assert (entry is None) == (params.logprobs is None)


@given(st.data(), SIZES, st.sampled_from([0.0, 1.0]), FILTERS, st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_broken_logits_never_leave_the_mask(
    data: st.DataObject, size: int, temperature: float, options: dict[str, Any], seed: int
) -> None:
    among = data.draw(masks_of(size))
    logits = random_logits(seed, size)
    rng = np.random.default_rng(seed)
    for value in (math.nan, INF, -INF, 3e38):
        logits[rng.random(size) < data.draw(st.sampled_from([0.0, 0.3, 1.0]))] = value
    assert drawn(logits, among, temperature=temperature, seed=seed, **options) in among


@given(st.data(), SIZES, st.sampled_from([0.0, 1.0]), FILTERS, st.integers(0, 2**32), st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_row_draws_what_is_drawn_one_by_one(
    data: st.DataObject, size: int, temperature: float, options: dict[str, Any], seed: int, masked: bool
) -> None:
    k = data.draw(st.integers(0, 6))
    rows = [random_logits(seed + i, size) for i in range(k + 1)]
    masks = np.stack([mask_of(data.draw(masks_of(size)), size) for _ in rows]) if masked else None
    params = SamplingParams(max_tokens=99, temperature=temperature, seed=seed, **options)
    plain = sampler_for(params, size)
    alone: list[tuple[int, TokenLogprobs | None]] = [
        plain.sample(0, 9 + i, row, None if masks is None else masks[i]) for i, row in enumerate(rows)
    ]
    holds = data.draw(st.integers(0, k))
    draft = [token if i < holds else (token + 1) % size for i, (token, _) in enumerate(alone[:k])]
    tokens, logprobs = sampler_for(params, size).sample_row(0, 9, rows, draft, masks)
    assert tokens == [token for token, _ in alone[: holds + 1]]
    assert logprobs == (None if params.logprobs is None else [entry for _, entry in alone[: holds + 1]])


def test_history_goes_on_behind_a_draft() -> None:
    """Tokens of a row count for what comes after it: for penalties, and for the least number of tokens."""
    params = SamplingParams(max_tokens=9, temperature=0.0, presence_penalty=5.0, min_tokens=3)
    logits = logits_of(3.0, 2.0, 1.0, 9.0)
    sampler = sampler_for(params, 4)
    assert sampler.sample_row(0, 1, [logits] * 2, [0]) == ([0, 1], None)
    assert sampler.sample_row(0, 3, [logits]) == ([2], None)
    assert sampler.sample_row(0, 4, [logits]) == ([EOS], None)


def test_bans_that_leave_nothing_of_a_mask_do_not_count() -> None:
    logits = logits_of(5.0, 1.0, 2.0, 0.0)
    assert drawn(logits, [EOS], temperature=0.0, ignore_eos=True) == EOS
    assert drawn(logits, [1, EOS], temperature=0.0, ignore_eos=True) == 1
    assert drawn(logits_of(0.0, 1.0, 2.0, 9.0, 5.0), [1, 4], temperature=0.0, ignore_eos=True) == 4
    banned = {"temperature": 0.0, "min_tokens": 9, "stop_token_ids": frozenset({1, 2})}
    assert drawn(logits, [1, 2, EOS], **banned) == 2, "the most likely of what is banned"
    assert drawn(logits, [0, 2, EOS], **banned) == 0


def test_of_a_broken_row_the_permitted_are_equal() -> None:
    nothing = np.full(40, math.nan, dtype=np.float32)
    assert {drawn(nothing, [5, 39, 17], seed=seed) for seed in range(60)} == {5, 17, 39}
    assert drawn(nothing, [5, 39, 17], temperature=0.0) == 5
    assert drawn(logits_of(math.nan, 1.0, 2.0, 0.0), [0, 1, 2], temperature=0.0) == 2
    certain = logits_of(INF, 1.0, 2.0, INF, 3.0)
    assert drawn(certain, [1, 2]) in (1, 2)
    assert drawn(certain, [1, 3]) == 3
    assert drawn(nothing, [3, 8], ignore_eos=True) == 8, "a ban counts as long as it leaves something"


@pytest.mark.parametrize("among", [[2], [1, 2], [0, 1, 2, 3]])
def test_logprobs_are_of_the_raw_distribution_whatever_the_mask(among: list[int]) -> None:
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    params = SamplingParams(max_tokens=9, temperature=0.0, logprobs=2, logit_bias={2: 50.0})
    token, entry = sampler_for(params, 4).sample(0, 1, np.log(probabilities).astype(np.float32), mask_of(among, 4))
    assert token == 2
    assert entry is not None
    assert entry.logprob == pytest.approx(math.log(0.15), abs=1e-6)
    assert [t for t, _ in entry.top] == [0, 1]


@pytest.mark.parametrize("size", [31, 32, 33, 5000, 5017])
def test_ids_of_a_mask(size: int) -> None:
    rng = np.random.default_rng(size)
    for share in (0.0, 0.01, 0.5, 1.0):
        among = sorted({size - 1, *np.flatnonzero(rng.random(size) < share).tolist()})
        mask = mask_of(among, size)
        assert permitted_ids(mask, size).tolist() == among
        stray = mask | mask_of([*range(size, len(mask) * 32)], len(mask) * 32)
        assert permitted_ids(stray, size).tolist() == among, "bits beyond the vocabulary are nothing"


def test_a_mask_without_a_token_is_refused() -> None:
    sampler = Sampler(40, frozenset({EOS}))
    sampler.start(SequenceInit(0, SamplingParams(max_tokens=9), [1], 1))
    with pytest.raises(ValueError, match="no token"):
        sampler.sample(0, 1, random_logits(1, 40), np.zeros(2, dtype=np.int32))


def test_the_reference_knows_what_bans_leave() -> None:
    params = SamplingParams(max_tokens=9, min_tokens=2, stop_token_ids=frozenset({0}))
    logits = [1.0, 2.0, 3.0, 4.0]
    assert reference_masked(logits, [0, 1, 3], params, 1, [EOS]) == [-INF, 2.0, -INF, -INF]
    assert reference_masked(logits, [0, 3], params, 1, [EOS]) == [1.0, -INF, -INF, 4.0]
    assert reference_masked(logits, [0, 3], params, 2, [EOS]) == [1.0, -INF, -INF, 4.0]
