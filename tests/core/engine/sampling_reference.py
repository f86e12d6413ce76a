"""Sampling as slow and obvious as it can be written, and short ways to the engine's own, for tests that compare the two."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from inferflux_core.engine.sampling import Logits, Sampler
from inferflux_core.engine.types import SamplingParams, SequenceInit

INF = math.inf
EOS = 3


def logits_of(*values: float) -> Logits:
    return np.array(values, dtype=np.float32)


def random_logits(seed: int, size: int, spread: float = 3.0) -> Logits:
    return (np.random.default_rng(seed).standard_normal(size) * spread).astype(np.float32)


def sampler_for(
    params: SamplingParams, size: int, prompt: Sequence[int] = (0,), output: Sequence[int] = (), eos: Sequence[int] = (EOS,)
) -> Sampler:
    sampler = Sampler(size, frozenset(eos))
    sampler.start(SequenceInit(0, params, [*prompt, *output], len(prompt)))
    return sampler


def draw(logits: Logits, *, prompt: Sequence[int] = (0,), output: Sequence[int] = (), **params: Any) -> int:
    """The token drawn at position 7."""
    full = SamplingParams(**{"max_tokens": 100, **params})
    return sampler_for(full, len(logits), prompt, output).sample(0, 7, logits)[0]


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox-4x32-10, as written in the paper."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (q >> 32) ^ b ^ k0, q & 0xFFFFFFFF, (p >> 32) ^ d ^ k1, p & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return a, b, c, d


def reference_noise(seed: int, position: int, token: int) -> float:
    word = philox((token // 4, position, 0, 0), (seed & 0xFFFFFFFF, seed >> 32))[token % 4]
    v = min((word + 0.5) / 2**32, 1 - 2**-24)
    return -math.log(-math.log1p(-v))


def reference_adjusted(
    logits: Sequence[float], params: SamplingParams, prompt: Sequence[int], output: Sequence[int], eos: Sequence[int]
) -> list[float]:
    """Bans, bias and penalties, token by token."""
    adjusted = []
    too_short = len(output) < params.min_tokens
    for token, logit in enumerate(logits):
        value = logit + params.logit_bias.get(token, 0.0)
        if token in eos and (params.ignore_eos or too_short):
            value = -INF
        if token in params.stop_token_ids and too_short:
            value = -INF
        if token in prompt or token in output:
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        occurrences = output.count(token)
        value -= params.frequency_penalty * occurrences + params.presence_penalty * (occurrences > 0)
        adjusted.append(value)
    return adjusted


def reference_candidates(adjusted: Sequence[float], params: SamplingParams) -> set[int]:
    """Tokens that survive temperature, top_k, top_p and min_p; ties at a threshold are kept."""
    scaled = [(a - max(adjusted)) / params.temperature for a in adjusted]
    alive = [t for t, s in enumerate(scaled) if s > -INF]
    if params.top_k:
        threshold = sorted((scaled[t] for t in alive), reverse=True)[: params.top_k][-1]
        alive = [t for t in alive if scaled[t] >= threshold]
    if params.top_p < 1:
        total = sum(math.exp(scaled[t]) for t in alive)
        mass, threshold = 0.0, -INF
        for t in sorted(alive, key=lambda t: -scaled[t]):
            mass += math.exp(scaled[t])
            threshold = scaled[t]
            if mass >= params.top_p * total:
                break
        alive = [t for t in alive if scaled[t] >= threshold]
    if params.min_p:
        alive = [t for t in alive if math.exp(scaled[t]) >= params.min_p]
    return set(alive)


def reference_draw(adjusted: Sequence[float], params: SamplingParams, position: int) -> int:
    if params.temperature == 0:
        return max(range(len(adjusted)), key=lambda t: adjusted[t])
    candidates = sorted(reference_candidates(adjusted, params))
    return max(candidates, key=lambda t: adjusted[t] / params.temperature + reference_noise(params.seed, position, t))


def mask_of(tokens: Sequence[int], size: int) -> npt.NDArray[np.int32]:
    """Words of a mask that permits these tokens."""
    words = [0] * ((size + 31) // 32)
    for token in tokens:
        words[token // 32] |= 1 << token % 32
    return np.array(words, dtype=np.uint32).view(np.int32)


def reference_masked(
    logits: Sequence[float], among: Sequence[int], params: SamplingParams, num_output: int, eos: Sequence[int]
) -> list[float]:
    """A mask and bans: all but what they leave becomes impossible; bans that leave nothing do not count."""
    too_short = num_output < params.min_tokens
    banned = {*(eos if params.ignore_eos or too_short else ()), *(params.stop_token_ids if too_short else ())}
    left = set(among) - banned or set(among)
    return [logit if token in left else -INF for token, logit in enumerate(logits)]
