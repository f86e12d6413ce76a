"""Device samplers by both ways of drawing, and the reference that they are compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace as replace_fields
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the torch backend's tests need torch")

import torch
from torch import Tensor

from inferflux_backend_torch.device_draw import DeviceDraw
from inferflux_backend_torch.sampler import DeviceSampler
from inferflux_core.engine.sampling import Logits, Sampler
from inferflux_core.engine.types import SamplingParams, SequenceInit, TokenLogprobs

INF = math.inf
EOS = 3
CPU = torch.device("cpu")
SIZES = (7, 101, 4099, 49152)

Make = Callable[[int], DeviceSampler]


def host_sampler(size: int, eos: Sequence[int] = (EOS,)) -> DeviceSampler:
    return DeviceSampler(size, frozenset(eos), 64, CPU)


def device_sampler(size: int, eos: Sequence[int] = (EOS,)) -> DeviceSampler:
    """What every device but the CPU runs."""
    return DeviceSampler(size, frozenset(eos), 64, CPU, DeviceDraw(size, 64, CPU))


both = pytest.mark.parametrize("make", [host_sampler, device_sampler])


def random_logits(seed: int, size: int, spread: float = 3.0) -> Logits:
    return (np.random.default_rng(seed).standard_normal(size) * spread).astype(np.float32)


def params_of(**values: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 100, **values})


def reference_draw(init: SequenceInit, size: int, logits: Logits, position: int) -> tuple[int, TokenLogprobs | None]:
    sampler = Sampler(size, frozenset({EOS}))
    sampler.start(replace_fields(init, slot=0))
    return sampler.sample(0, position, logits)


def draws(make: Make, logits: Tensor, inits: Sequence[SequenceInit]) -> list[int]:
    """The next token of each sequence, drawn in one batch."""
    sampler = make(logits.shape[1])
    for init in inits:
        sampler.start(init)
    return sampler.sample(logits, [init.slot for init in inits], [len(init.tokens) for init in inits]).collect()[0]


def seeded(count: int, **params: Any) -> list[SequenceInit]:
    return [SequenceInit(slot, params_of(seed=1000 * slot + 7, **params), [0] * 7, 7) for slot in range(count)]


def check_logprobs(found: TokenLogprobs | None, expected: TokenLogprobs | None) -> None:
    if expected is None or found is None:
        assert found is expected
        return
    assert found.logprob == pytest.approx(expected.logprob, abs=1e-4)
    assert [token for token, _ in found.top] == [token for token, _ in expected.top]
    assert [logprob for _, logprob in found.top] == pytest.approx([logprob for _, logprob in expected.top], abs=1e-4)
