"""Every sampling parameter against a slow and obvious reference, and broken logits."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.engine.sampling_reference import (
    EOS,
    INF,
    draw,
    logits_of,
    random_logits,
    reference_adjusted,
    reference_candidates,
    reference_draw,
    reference_noise,
    sampler_for,
)
from inferflux_core.engine.sampling import Logits
from inferflux_core.engine.types import SamplingParams, SequenceInit, TokenLogprobs


@st.composite
def cases(drawer: st.DrawFn) -> tuple[list[float], SamplingParams, list[int], list[int]]:
    """Logits on a grid without ties, so that float32 and float64 agree on every comparison."""
    size = drawer(st.integers(4, 40))
    order = drawer(st.permutations(range(size)))
    logits = [0.375 * (place - size // 2) + 0.0625 for place in order]
    tokens = st.integers(0, size - 1)
    params = SamplingParams(
        max_tokens=50,
        min_tokens=drawer(st.integers(0, 4)),
        temperature=drawer(st.sampled_from([0.0, 0.5, 1.0, 1.7])),
        top_k=drawer(st.sampled_from([0, 1, 2, 5, 1000])),
        top_p=drawer(st.sampled_from([1.0, 0.83, 0.31, 0.0])),
        min_p=drawer(st.sampled_from([0.0, 0.0371, 0.517])),
        repetition_penalty=drawer(st.sampled_from([1.0, 1.3, 0.7])),
        frequency_penalty=drawer(st.sampled_from([0.0, 0.41, -1.1])),
        presence_penalty=drawer(st.sampled_from([0.0, 0.87, -0.33])),
        logit_bias=drawer(st.dictionaries(tokens, st.sampled_from([-100.0, -1.1, 2.3]), max_size=3)),
        seed=drawer(st.integers(0, 2**64 - 1)),
        stop_token_ids=frozenset(drawer(st.lists(tokens, max_size=2))),
        ignore_eos=drawer(st.booleans()),
    )
    prompt = drawer(st.lists(tokens, min_size=1, max_size=6))
    output = drawer(st.lists(tokens, max_size=6))
    return logits, params, prompt, output


# A near-tie would be decided by rounding: the reference says so, and the case is not judged.
def _is_close_call(adjusted: list[float], params: SamplingParams, position: int) -> bool:
    if params.temperature == 0:
        scores = sorted(adjusted, reverse=True)
        return scores[0] - scores[1] < 1e-4
    scaled = sorted((a - max(adjusted)) / params.temperature for a in adjusted if a > -INF)
    gaps = [b - a for a, b in itertools.pairwise(scaled)]
    scores = sorted(
        (
            adjusted[t] / params.temperature + reference_noise(params.seed, position, t)
            for t in reference_candidates(adjusted, params)
        ),
        reverse=True,
    )
    return (min(gaps, default=1.0) < 1e-4) or (len(scores) > 1 and scores[0] - scores[1] < 1e-4)


@given(cases(), st.integers(1, 2**32 - 1))
@settings(max_examples=300, deadline=None)
def test_all_parameters_together_are_the_reference(
    case: tuple[list[float], SamplingParams, list[int], list[int]], position: int
) -> None:
    logits, params, prompt, output = case
    sampler = sampler_for(params, len(logits), prompt, output)
    given_logits = logits_of(*logits)
    adjusted = reference_adjusted(logits, params, prompt, output, [EOS])
    if max(adjusted) == -INF or _is_close_call(adjusted, params, position):
        return
    assert sampler.sample(0, position, given_logits)[0] == reference_draw(adjusted, params, position)
    assert given_logits.tolist() == logits, "the caller's logits were changed"


# --- one parameter at a time ------------------------------------------------------------------------------------------


def support(logits: Logits, **params: Any) -> set[int]:
    """Tokens that 300 seeds draw."""
    return {draw(logits, seed=seed, **params) for seed in range(300)}


def test_greedy_takes_the_first_of_equals() -> None:
    assert draw(logits_of(1, 5, 2, 5), temperature=0.0) == 1


def test_top_k_keeps_the_most_likely() -> None:
    assert support(logits_of(1.0, 1.2, 0.8, 1.1), top_k=2) == {1, 3}


def test_top_k_keeps_ties_at_its_threshold() -> None:
    assert support(logits_of(1.0, 2.0, 1.0, 0.9), top_k=2) == {0, 1, 2}


@pytest.mark.parametrize("top_k", [0, 4, 5, 10**6])
def test_top_k_of_everything_is_off(top_k: int) -> None:
    assert support(logits_of(1, 1, 1, 1), top_k=top_k) == {0, 1, 2, 3}


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    probabilities = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    assert support(probabilities, top_p=0.49) == {0}
    assert support(probabilities, top_p=0.79) == {0, 1}
    assert support(probabilities, top_p=0.81) == {0, 1, 2}


def test_top_p_keeps_ties_at_its_threshold() -> None:
    assert support(logits_of(2, 1, 1, -20), top_p=0.6) == {0, 1, 2}
    assert support(logits_of(1, 1, 1, 1), top_p=0.01) == {0, 1, 2, 3}


def test_top_p_counts_what_top_k_left() -> None:
    probabilities = np.log(np.array([0.4, 0.3, 0.2, 0.1], dtype=np.float32))
    assert support(probabilities, top_k=2, top_p=0.56) == {0}, "0.4 of 0.7 is 0.571"
    assert support(probabilities, top_p=0.56) == {0, 1}


def test_top_p_beyond_the_window_of_likely_tokens() -> None:
    """A flat distribution needs more tokens than the first look takes in."""
    logits = np.linspace(0, -0.5, 2000, dtype=np.float32)
    kept = reference_candidates(logits.tolist(), SamplingParams(max_tokens=1, top_p=0.5))
    drawn = {draw(logits, seed=seed, top_p=0.5) for seed in range(1500)}
    assert 800 < len(kept) < 1000
    assert max(drawn) < len(kept)
    assert max(drawn) > 800


def test_min_p_is_relative_to_the_most_likely() -> None:
    probabilities = np.log(np.array([0.6, 0.31, 0.05, 0.04], dtype=np.float32))
    assert support(probabilities, min_p=0.5) == {0, 1}
    assert support(probabilities, min_p=0.0834) == {0, 1}
    assert support(probabilities, min_p=1.0) == {0}


def test_repetition_penalty_counts_prompt_and_output_and_pushes_negatives_down() -> None:
    logits = logits_of(2.0, 1.5, 1.2, -9)
    assert draw(logits, prompt=[1], output=[0], temperature=0.0, repetition_penalty=2.0) == 2
    assert draw(logits_of(-1.0, -1.5, -9, -9), prompt=[0], temperature=0.0, repetition_penalty=2.0) == 1


def test_output_penalties_do_not_count_the_prompt() -> None:
    logits = logits_of(2.0, 1.5, 0.0, -9)
    assert draw(logits, prompt=[0, 0, 0], temperature=0.0, frequency_penalty=2.0, presence_penalty=2.0) == 0


def test_frequency_penalty_counts_every_occurrence_and_presence_the_first() -> None:
    logits = logits_of(2.0, 1.0, 0.0, -9)
    assert draw(logits, output=[0], temperature=0.0, frequency_penalty=0.6) == 0
    assert draw(logits, output=[0, 0], temperature=0.0, frequency_penalty=0.6) == 1
    assert draw(logits, output=[0, 0], temperature=0.0, presence_penalty=0.6) == 0
    assert draw(logits, output=[0], temperature=0.0, presence_penalty=1.1) == 1


def test_penalties_see_what_was_drawn() -> None:
    sampler = sampler_for(SamplingParams(max_tokens=9, temperature=0.0, presence_penalty=5.0), 4)
    logits = logits_of(3.0, 2.0, 1.0, 0.0)
    assert [sampler.sample(0, position, logits)[0] for position in range(1, 5)] == [0, 1, 2, 3]


def test_logit_bias_adds() -> None:
    assert draw(logits_of(2, 1, 0, -9), temperature=0.0, logit_bias={1: 1.5, 2: 1.9}) == 1
    assert support(logits_of(0, 0, 0, -50), logit_bias={0: -100.0}) == {1, 2}


def test_min_tokens_bans_end_and_stop_tokens_until_then() -> None:
    params = SamplingParams(max_tokens=9, temperature=0.0, min_tokens=2, stop_token_ids=frozenset({0}))
    sampler = sampler_for(params, 4)
    logits = logits_of(5.0, 1.0, 0.0, 6.0)
    assert [sampler.sample(0, position, logits)[0] for position in range(1, 4)] == [1, 1, EOS]


def test_min_tokens_counts_the_output_before_a_preemption() -> None:
    logits = logits_of(5.0, 1.0, 0.0, 6.0)
    assert draw(logits, output=[1], temperature=0.0, min_tokens=2) == 0
    assert draw(logits, output=[1, 1], temperature=0.0, min_tokens=2) == EOS


def test_ignore_eos_never_draws_it_but_stop_tokens() -> None:
    logits = logits_of(5.0, 1.0, 0.0, 6.0)
    assert draw(logits, output=[1] * 50, temperature=0.0, ignore_eos=True, stop_token_ids=frozenset({0})) == 0


def test_a_slot_is_begun_anew() -> None:
    sampler = sampler_for(SamplingParams(max_tokens=9, temperature=0.0, presence_penalty=5.0), 4)
    logits = logits_of(3.0, 2.0, 1.0, 0.0)
    assert sampler.sample(0, 1, logits)[0] == 0
    sampler.start(SequenceInit(0, SamplingParams(max_tokens=9, temperature=0.0), [1], 1))
    assert sampler.sample(0, 1, logits)[0] == 0
    sampler.free(0)
    with pytest.raises(KeyError):
        sampler.sample(0, 1, logits)


# --- numbers at their limits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1e-50, 5e-324, 1e-9, 1e-5, 1e-4])
def test_tiny_temperatures_are_greedy(temperature: float) -> None:
    assert draw(logits_of(1.0, 1.01, 0.99, -5), temperature=temperature) == 1


@pytest.mark.parametrize("temperature", [0.0, 1e-5, 1.0, 2.0])
def test_extreme_logits_draw_what_is_possible(temperature: float) -> None:
    assert draw(logits_of(-INF, -INF, 0.0, -INF), temperature=temperature) == 2
    assert draw(logits_of(3e38, -3e38, 0, 0), temperature=temperature) == 0
    assert draw(logits_of(-3e38, -3.1e38, -3.2e38, -3.3e38), temperature=temperature) == 0


def test_equal_logits_draw_everything_evenly() -> None:
    found = Counter(draw(np.full(4, 7.25, dtype=np.float32), temperature=1e-5, seed=seed) for seed in range(2000))
    assert sum((found[t] - 500) ** 2 / 500 for t in range(4)) < 16.3


@pytest.mark.parametrize("filters", [{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1}])
def test_impossible_tokens_survive_no_filter(filters: dict[str, Any]) -> None:
    assert support(logits_of(-INF, 1.0, -INF, 1.0), **filters) == {1, 3}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("filters", [{}, {"top_k": 2, "top_p": 0.9, "min_p": 0.01, "logprobs": 2}])
class TestBrokenLogits:
    """A model that went wrong numerically must not take the engine, and so everyone else's requests, along."""

    def test_nan_is_impossible(self, temperature: float, filters: dict[str, Any]) -> None:
        logits = logits_of(math.nan, -40.0, 1.0, math.nan)
        assert draw(logits, temperature=temperature, **filters) == 2

    def test_infinity_is_certain(self, temperature: float, filters: dict[str, Any]) -> None:
        assert draw(logits_of(50.0, INF, math.nan, 1.0), temperature=temperature, **filters) == 1

    @pytest.mark.parametrize("value", [math.nan, -INF])
    def test_if_nothing_is_possible_all_are_equal(self, temperature: float, filters: dict[str, Any], value: float) -> None:
        logits = np.full(4, value, dtype=np.float32)
        drawn = {draw(logits, temperature=temperature, seed=seed, **filters) for seed in range(100)}
        assert drawn == ({0} if temperature == 0 else {0, 1, 2, 3})

    def test_bans_that_leave_nothing_do_no_harm(self, temperature: float, filters: dict[str, Any]) -> None:
        stops = frozenset(range(4))
        token = draw(logits_of(1, 2, 3, 4), temperature=temperature, min_tokens=5, stop_token_ids=stops, **filters)
        assert token in stops


# --- logprobs ---------------------------------------------------------------------------------------------------------


def logprobs_of(logits: Logits, **params: Any) -> TokenLogprobs:
    sampler = sampler_for(SamplingParams(**{"max_tokens": 9, "temperature": 0.0, **params}), len(logits))
    entry = sampler.sample(0, 1, logits)[1]
    assert entry is not None
    return entry


def test_logprobs_are_of_the_raw_distribution() -> None:
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    entry = logprobs_of(np.log(probabilities).astype(np.float32), logprobs=3, logit_bias={3: 100.0}, temperature=0.1)
    assert entry.logprob == pytest.approx(math.log(0.05), abs=1e-6)
    assert [token for token, _ in entry.top] == [0, 1, 2]
    assert [logprob for _, logprob in entry.top] == pytest.approx(np.log(probabilities[:3]).tolist(), abs=1e-6)


@pytest.mark.parametrize("count", [0, 1, 3, 4])
def test_as_many_alternatives_as_asked_for(count: int) -> None:
    assert [token for token, _ in logprobs_of(logits_of(1, 3, 2, 0), logprobs=count).top] == [1, 2, 0, 3][:count]


def test_no_logprobs_unless_asked_for() -> None:
    sampler = sampler_for(SamplingParams(max_tokens=9, temperature=0.0), 4)
    assert sampler.sample(0, 1, logits_of(1, 2, 3, 4)) == (3, None)


def test_equally_likely_alternatives_come_by_id() -> None:
    """So a greedily drawn token is always the first alternative."""
    logits = np.zeros(300, dtype=np.float32)
    logits[[250, 20, 130]] = 1.0
    entry = logprobs_of(logits, logprobs=5)
    assert [token for token, _ in entry.top] == [20, 130, 250, 0, 1]
    assert entry.top[0][1] == entry.logprob


def test_logprobs_of_huge_logits_do_not_overflow() -> None:
    assert logprobs_of(logits_of(3e38, 3e38, -3e38, 0), logprobs=1).logprob == pytest.approx(-math.log(2))


def test_logprobs_of_a_large_vocabulary_sum_to_one() -> None:
    logits = random_logits(3, 50_000, 5.0)
    entry = logprobs_of(logits, logprobs=50_000)
    assert sum(math.exp(logprob) for _, logprob in entry.top) == pytest.approx(1, abs=1e-5)
    assert [token for token, _ in entry.top] == np.argsort(-logits, kind="stable").tolist()
