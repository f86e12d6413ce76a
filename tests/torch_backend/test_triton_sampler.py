"""Drawing by Triton, interpreted, against device_draw and core's reference sampler."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("torch", reason="the torch backend is not installed")

import torch

from inferflux_backend_torch import device_draw
from inferflux_core.engine.sampling import Sampler, gumbel_noise, philox_4x32
from inferflux_core.engine.types import SamplingParams, SequenceInit
from torch_backend.triton_interpreter import isolate, triton_sampler

# Without shrinking, which takes minutes in the interpreter.
_INTERPRETED = settings(deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
_VOCABULARIES = [1, 7, 101, 2048, 4099, 9001]


def _logits(rows: int, vocab_size: int, seed: int) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", [0, 1, 2**32 + 5, 2**63 - 1, -1])
@pytest.mark.parametrize("position", [0, 5, 2**31 - 1])
def test_noise_is_the_reference_s(seed: int, position: int) -> None:
    """A row of equal logits is decided by noise alone; scores of single tokens give the noise away."""
    vocab_size = 4096 + 5
    expected = gumbel_noise(seed & (2**64 - 1), position, np.arange(vocab_size))
    rows = 6
    order = np.argsort(-expected)
    # Each row lets one token less take part, so that the draws run through the tokens in the order of their noise.
    scaled = torch.zeros(rows, vocab_size)
    for row in range(rows):
        scaled[row, order[:row].copy()] = -torch.inf
    drawn = triton_sampler.gumbel_argmax(
        scaled, torch.full((rows,), -1.0), torch.full((rows,), seed), torch.full((rows,), position)
    )
    assert drawn.tolist() == order[:rows].tolist()


def test_great_noise_is_exact_to_float32() -> None:
    """It decides draws, and comes from logarithms of numbers next to 1. A lead of 1e-5 over another token must tell."""
    vocab_size, seed, position, lead = 30000, 5, 9, 1e-5
    noise = gumbel_noise(seed, position, np.arange(vocab_size))
    order = np.argsort(-noise)[:9].copy()
    rows = []
    for great in order[1:]:
        for difference in (lead, -lead):
            row = torch.full((vocab_size,), -torch.inf)
            row[order[0]] = float(noise[great]) - float(noise[order[0]]) + difference
            row[great] = 0.0
            rows.append(row)
    scaled = torch.stack(rows)
    drawn = triton_sampler.gumbel_argmax(
        scaled,
        torch.full((len(rows),), -torch.inf),
        torch.full((len(rows),), seed),
        torch.full((len(rows),), position),
    )
    assert drawn.tolist() == [token for great in order[1:] for token in (order[0], great)]


def test_words_are_philox_s() -> None:
    """Bit for bit: two tokens whose noise differs by one unit of the 32-bit word are told apart where float32 can."""
    seed, position, vocab_size = 77, 12, 64
    words = np.stack(philox_4x32(seed, position, np.arange(vocab_size // 4, dtype=np.uint64)), 1).reshape(-1)
    noise = gumbel_noise(seed, position, np.arange(vocab_size))
    by_word, by_noise = np.argsort(words), np.argsort(-noise)
    assert by_word.tolist() == by_noise.tolist()  # small words are great noise
    scaled = torch.zeros(vocab_size, vocab_size)
    for row in range(vocab_size):
        scaled[row, by_word[:row].copy()] = -torch.inf
    drawn = triton_sampler.gumbel_argmax(
        scaled, torch.full((vocab_size,), -1.0), torch.full((vocab_size,), seed), torch.full((vocab_size,), position)
    )
    assert drawn.tolist() == by_word.tolist()


@pytest.mark.parametrize("vocab_size", _VOCABULARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_argmax_takes_the_lowest_id_of_equals(vocab_size: int, dtype: torch.dtype) -> None:
    logits = _logits(6, vocab_size, vocab_size).to(dtype)
    logits[1] = 1.0
    logits[2, -1] = torch.inf
    logits[3, vocab_size // 2 :] = torch.nan
    logits[4] = torch.nan
    logits[5] = -torch.inf
    expected = device_draw.argmax(logits)
    assert triton_sampler.argmax(logits).tolist() == expected.tolist()
    assert triton_sampler.argmax(logits[::2]).tolist() == expected[::2].tolist()


@pytest.mark.parametrize("vocab_size", _VOCABULARIES)
def test_scale(vocab_size: int) -> None:
    logits = _logits(6, vocab_size, vocab_size)
    logits[1] *= 1e30
    logits[2, ::3] = torch.inf
    logits[3, ::2] = torch.nan
    logits[4] = torch.nan
    logits[5] = -torch.inf
    temperature = torch.tensor([1.0, 1e-5, 0.7, 2.0, 1.0, 0.3])
    expected = device_draw.scale(logits, temperature)
    torch.testing.assert_close(triton_sampler.scale(logits, temperature), expected, rtol=1e-6, atol=0)


@settings(_INTERPRETED, max_examples=25)
@given(
    vocab_size=st.sampled_from(_VOCABULARIES),
    top_k=st.integers(1, 60) | st.just(2**31),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.5]),
    tied=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_thresholds_keep_what_the_reference_keeps(
    vocab_size: int, top_k: int, top_p: float, min_p: float, tied: bool, seed: int
) -> None:
    logits = _logits(1, vocab_size, seed)
    if tied:
        logits = logits.round()
    scaled = device_draw.scale(logits, torch.tensor([0.8]))
    log_min_p = math.log(min_p) if min_p else -math.inf
    thresholds = triton_sampler.filter_thresholds(
        scaled, torch.tensor([top_k]), torch.tensor([top_p], dtype=torch.float64), torch.tensor([log_min_p])
    )
    params = SamplingParams(max_tokens=1, temperature=0.8, top_k=top_k if top_k < 2**31 else 0, top_p=top_p, min_p=min_p)
    array = logits[0].numpy()
    kept, _ = Sampler(vocab_size, frozenset())._filter(params, array, array.max())
    assert (scaled[0] >= thresholds[0]).nonzero().flatten().tolist() == kept.tolist()


def test_rows_have_thresholds_of_their_own() -> None:
    scaled = device_draw.scale(_logits(5, 3000, 3), torch.ones(5))
    arguments = (
        torch.tensor([3000, 5, 2999, 1, 40]),
        torch.tensor([1.0, 1.0, 0.3, 0.9, 0.8], dtype=torch.float64),
        torch.tensor([-math.inf, -1.0, -math.inf, -math.inf, -2.0]),
    )
    expected = device_draw.filter_thresholds(scaled, *arguments).tolist()
    assert triton_sampler.filter_thresholds(scaled, *arguments).tolist() == [-math.inf, *expected[1:]]


@settings(_INTERPRETED, max_examples=25)
@given(
    vocab_size=st.sampled_from(_VOCABULARIES),
    temperature=st.sampled_from([0.2, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 10, 200]),
    top_p=st.sampled_from([0.7, 1.0]),
    seed=st.integers(-(2**63), 2**63 - 1),
    position=st.integers(0, 2**20),
    values=st.integers(0, 1000),
)
def test_draws_are_the_reference_s(
    vocab_size: int, temperature: float, top_k: int, top_p: float, seed: int, position: int, values: int
) -> None:
    logits = _logits(2, vocab_size, values)
    scaled = triton_sampler.scale(logits, torch.full((2,), temperature))
    thresholds = triton_sampler.filter_thresholds(
        scaled,
        torch.full((2,), top_k or vocab_size),
        torch.full((2,), top_p, dtype=torch.float64),
        torch.full((2,), -math.inf),
    )
    seeds, positions = torch.tensor([seed, seed ^ 3]), torch.tensor([position, position + 1])
    drawn = triton_sampler.gumbel_argmax(scaled, thresholds, seeds, positions).tolist()
    for row in range(2):
        key = int(seeds[row]) & (2**64 - 1)
        params = SamplingParams(max_tokens=1, temperature=temperature, top_k=top_k, top_p=top_p, seed=key)
        sampler = Sampler(vocab_size, frozenset())
        sampler.start(SequenceInit(slot=0, params=params, tokens=[0], num_prompt_tokens=1))
        expected, _ = sampler.sample(0, int(positions[row]), logits[row].numpy())
        if drawn[row] != expected:  # only rounding may decide otherwise
            noisy = scaled[row].numpy() + gumbel_noise(key, int(positions[row]), np.arange(vocab_size))
            assert abs(noisy[drawn[row]] - noisy[expected]) < 1e-5
            assert scaled[row, drawn[row]] >= thresholds[row]


def test_no_rows() -> None:
    empty, none = torch.empty(0, 50), torch.empty(0, dtype=torch.int64)
    assert triton_sampler.argmax(empty).shape == (0,)
    assert triton_sampler.scale(empty, torch.empty(0)).shape == (0, 50)
    assert triton_sampler.filter_thresholds(empty, none, torch.empty(0), torch.empty(0)).shape == (0,)
    assert triton_sampler.gumbel_argmax(empty, torch.empty(0), none, none).shape == (0,)


isolate(globals())
