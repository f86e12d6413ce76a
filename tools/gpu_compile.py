"""Compiles the kernels for an NVIDIA GPU that need not be there: launches are replaced by compilations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from inferflux_backend_torch import triton_sampler
from inferflux_backend_torch.ops import ACTIVATIONS
from inferflux_backend_torch.triton_ops import TritonOps
from inferflux_backend_torch.triton_steps import DeviceSteps
from inferflux_core.engine.types import PagedOps, Row
from torch_backend.attention_case import AttentionCase, build


@dataclass(frozen=True)
class Compiled:
    """One kernel for one kind of arguments."""

    name: str
    shared_memory: int


class _NoDevice:
    """What the compiler asks of a driver."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def _compiling(capability: int) -> Iterator[list[Compiled]]:
    """Within, launches only compile; the list is of what they compiled."""
    compiled: dict[Any, Compiled] = {}
    run = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **constants: Any) -> Any:
        made = run(kernel, *args, grid=grid, warmup=True, **constants)
        compiled[made.hash] = Compiled(kernel.__name__, made.metadata.shared)
        return made

    before = driver._active
    driver.set_active(_NoDevice(capability))
    found: list[Compiled] = []
    try:
        with mock.patch.object(JITFunction, "run", compile_only):
            yield found
    finally:
        driver._active = before
        found.extend(compiled.values())


def compile_kernels(capability: int) -> list[Compiled]:
    """All kernels, attention with the tiles of decode, split decode, prefill and verification of drafts.

    Args:
        capability: of the GPU, e.g. 90.

    Raises:
        Exception: of Triton's own kinds; one of them does not compile.
    """
    with _compiling(capability) as compiled:
        _compile_attention()
        _compile_the_rest()
    return compiled


def _compile_attention() -> None:
    bf16 = partial(AttentionCase, dtype=torch.bfloat16, block_size=32, heads=8, kv_heads=2, head_dim=128, rotary_dim=128)
    decode, prefill, both = ((8, 1),), ((8, 20),), ((8, 1), (8, 20))
    cases = [
        bf16(sequences=both),
        bf16(sequences=((5000, 1),)),
        bf16(sequences=both, cache_dtype=torch.float8_e4m3fn, q_norm=True, k_norm=True),
        bf16(sequences=((8, 3),)),
        replace(bf16(sequences=both), head_dim=256, rotary_dim=256, window=100, softcap=5.0),
        replace(bf16(sequences=prefill), head_dim=80, rotary_dim=32, heads=9, kv_heads=3),
        replace(bf16(sequences=decode), dtype=torch.float32),
        replace(bf16(sequences=prefill), dtype=torch.float16, head_dim=64, rotary_dim=64),
    ]
    ops = TritonOps(num_sms=132)
    for case in cases:
        step = build(case)
        ops.rope_and_cache(step.qkv, step.layer, step.inputs, step.cache)
        ops.attention(step.qkv, step.layer, step.inputs, step.cache)


def _compile_the_rest() -> None:
    ops = TritonOps(num_sms=132)
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.zeros(2, 4096, dtype=dtype)
        ops.rms_norm(x, torch.ones(4096), 1e-6)
        ops.add_rms_norm(x, x.clone(), torch.ones(4096), 1e-6)
        for activation in ACTIVATIONS:
            ops.act_mul(x, activation)  # type: ignore[arg-type]  # the keys are the activations
    logits, ones, ids = torch.zeros(2, 151936, dtype=torch.bfloat16), torch.ones(2), torch.ones(2, dtype=torch.int64)
    triton_sampler.argmax(logits)
    scaled = triton_sampler.scale(logits, ones)
    thresholds = triton_sampler.filter_thresholds(scaled, ids, ones.double(), ones)
    triton_sampler.gumbel_argmax(scaled, thresholds, ids, ids)
    row = Row(slot=0, start=0, n=2, tokens=[1, 2], n_draft=0, sample=True, kv=PagedOps((1,)))
    DeviceSteps(4, 4096, 32, torch.device("cpu")).inputs([row], [0])
