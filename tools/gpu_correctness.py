"""What `gpu_check.py` compares: each kernel with its torch twin, graphs with eager steps, the runner with the plain one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from gpu_model import LLAMA_1B, QWEN3_06B, TINY, ModelShape, random_decoder
from torch import Tensor

from inferflux_backend_torch import device_draw, triton_sampler
from inferflux_backend_torch.graphs import DecodeGraphs, NoRecorder
from inferflux_backend_torch.inputs import KVCache
from inferflux_backend_torch.loading import Loaded
from inferflux_backend_torch.ops import ACTIVATIONS, TorchOps
from inferflux_backend_torch.settings import TorchSettings
from inferflux_backend_torch.steps import HostSteps
from inferflux_backend_torch.triton_ops import TritonOps
from inferflux_backend_torch.triton_steps import DeviceSteps
from inferflux_core.engine.loop import EngineCore
from inferflux_core.engine.types import PagedOps, Row
from inferflux_core.interfaces import EngineConfig, ModelInfo, ModelRunner
from inferflux_core.plugins import load_plugins
from inferflux_core.testing.driver import make_request
from torch_backend.attention_case import AttentionCase, build

# Norm of the difference over the norm of the expected: a few roundings of the type.
_LIMITS = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Check:
    """One comparison; an exception is an infinite error."""

    name: str
    error: float
    limit: float
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.error <= self.limit


def run_checks(device: torch.device, interpreted: bool) -> Iterator[Check]:
    """All comparisons, one by one; small ones where Triton interprets."""
    checks: list[tuple[str, float, Callable[[], float]]] = []
    for name, case in _attention_cases(interpreted):
        checks.append((f"attention {name}", _LIMITS[case.dtype], partial(_attention, case, device)))
    sizes = (48, 80) if interpreted else (4096, 14336)
    dtypes = (torch.float32, torch.float16) if interpreted else tuple(_LIMITS)
    for dtype in dtypes:
        checks.append((f"norms and activations {dtype}", _LIMITS[dtype], partial(_rows, dtype, *sizes, device)))
    vocab_size = 4099 if interpreted else 151936
    checks.append(("sampler: share of other tokens", 0.0 if interpreted else 0.002, partial(_sampler, vocab_size, device)))
    checks.append(("sampler: thresholds", 1e-5, partial(_thresholds, vocab_size, device)))
    checks.append(("inputs of steps", 0.0, partial(_steps, device)))
    shape = TINY if interpreted else replace(QWEN3_06B, layers=4)
    checks.append(("decoder", 1e-3, partial(_decoder, shape, torch.float32, device)))
    if not interpreted:
        other = replace(LLAMA_1B, layers=4)
        checks.append(("decoder bfloat16", 4e-2, partial(_decoder, shape, torch.bfloat16, device)))
        checks.append(("decoder bfloat16, head_dim 64", 4e-2, partial(_decoder, other, torch.bfloat16, device)))
    # Products of a padded batch may be summed in another order.
    checks.append(("graphs against eager steps", 1e-5 if interpreted else 2e-2, partial(_graphs, shape, device)))
    other_tokens = "runner against the plain one: share of other tokens"
    checks.append((other_tokens, 0.0 if interpreted else 0.05, partial(_runner, shape, device)))
    for name, limit, run in checks:
        try:
            yield Check(name, run(), limit)
        except Exception as error:
            yield Check(name, math.inf, limit, f"{type(error).__name__}: {error}")


def _attention_cases(interpreted: bool) -> list[tuple[str, AttentionCase]]:
    if interpreted:
        # No fp8 here: the interpreter loses the carry when it rounds up to the next power of two.
        few = ((40, 1), (3, 1), (30, 9), (0, 17))
        return [
            ("ragged", AttentionCase(sequences=few, heads=6, head_dim=20, rotary_dim=20, q_norm=True, k_norm=True)),
            ("window, softcap, float16", AttentionCase(sequences=few, window=20, softcap=5.0, dtype=torch.float16)),
            ("long decodes", AttentionCase(sequences=((600, 1), (3, 1)))),
        ]
    decodes = tuple((context, 1) for context in (0, 1, 31, 32, 33, 500, 3000, 8191))
    ragged = (*decodes, (2000, 512), (0, 700), (5000, 17), (63, 2))
    base = AttentionCase(
        sequences=ragged, heads=32, kv_heads=8, head_dim=128, block_size=32, rotary_dim=128, dtype=torch.bfloat16
    )
    half, fp8 = torch.float16, torch.float8_e4m3fn
    return [
        ("32/8x128 bf16", base),
        ("32/8x128 fp16", replace(base, dtype=half)),
        ("32/8x128 bf16, fp8 cache", replace(base, cache_dtype=fp8)),
        ("32/8x128 float32", replace(base, dtype=torch.float32)),
        ("16/8x128 bf16, head norms", replace(base, heads=16, q_norm=True, k_norm=True)),
        ("9/3x64 bf16, block 16", replace(base, heads=9, kv_heads=3, head_dim=64, rotary_dim=64, block_size=16)),
        ("32/32x80 bf16, partial rotation", replace(base, kv_heads=32, head_dim=80, rotary_dim=32)),
        ("32/32x96 bf16, window", replace(base, kv_heads=32, head_dim=96, rotary_dim=96, window=1024)),
        ("8/4x256 bf16, window, softcap", replace(base, heads=8, kv_heads=4, head_dim=256, window=512, softcap=50.0)),
        ("64/1x128 bf16", replace(base, heads=64, kv_heads=1)),
        ("one launch for all", replace(base, num_decodes=0)),
        ("one decode, 20000 tokens", replace(base, sequences=((20000, 1),))),
        ("one decode, fp8 cache", replace(base, sequences=((20000, 1),), cache_dtype=fp8)),
        ("40 decodes", replace(base, sequences=tuple((97 * i, 1) for i in range(40)))),
        ("4096 prefill", replace(base, sequences=((0, 4096),))),
    ]  # fmt: skip


def _difference(ours: Tensor, expected: Tensor) -> float:
    ours, expected = ours.double(), expected.double()
    error = float((ours - expected).norm() / expected.norm().clamp_min(1e-30))
    return math.inf if math.isnan(error) else error


def _ops(device: torch.device) -> TritonOps:
    return TritonOps() if device.type == "cuda" else TritonOps(num_sms=8)


def _attention(case: AttentionCase, device: torch.device) -> float:
    """Queries, what the cache holds of this step, and the result. torch cannot index fp8 on every GPU: it rounds instead."""
    fp8 = case.cache_dtype is torch.float8_e4m3fn
    results = []
    for ops in (_ops(device), TorchOps()):
        oracle = not isinstance(ops, TritonOps)
        step = build(case, str(device))
        if fp8 and oracle:
            data = step.cache.data.to(case.dtype)
            step.cache = KVCache(2, data.shape[2], case.block_size, case.kv_heads, case.head_dim, case.dtype, device)
            step.cache.data.copy_(data)
        ops.rope_and_cache(step.qkv, step.layer, step.inputs, step.cache)
        if fp8 and oracle:
            step.cache.data.copy_(step.cache.data.to(torch.float8_e4m3fn))
        out = ops.attention(step.qkv, step.layer, step.inputs, step.cache)
        stored = step.cache.data[1].float().flatten(1, 2)[:, step.inputs.slot_mapping]
        results.append((out, step.qkv, stored))
    return max(_difference(ours.float(), expected.float()) for ours, expected in zip(*results, strict=True))


def _rows(dtype: torch.dtype, hidden: int, intermediate: int, device: torch.device) -> float:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    x, residual, weight = normal(37, hidden).to(dtype), normal(37, hidden).to(dtype), normal(hidden)
    gate_up = (3 * normal(37, 2 * intermediate)).to(dtype)
    results = []
    for ops in (_ops(device), TorchOps()):
        sums = residual.clone()
        outputs = [ops.rms_norm(x, weight, 1e-6), ops.add_rms_norm(x, sums, weight, 1e-6), sums]
        outputs += [ops.act_mul(gate_up, name) for name in ACTIVATIONS]  # type: ignore[arg-type]  # its keys are the activations
        results.append(outputs)
    return max(_difference(ours, expected) for ours, expected in zip(*results, strict=True))


def _logits(rows: int, vocab_size: int, device: torch.device) -> Tensor:
    return 3 * torch.randn(rows, vocab_size, generator=torch.Generator(device).manual_seed(1), device=device)


def _sampler(vocab_size: int, device: torch.device) -> float:
    rows = 8 if device.type == "cpu" else 512
    logits = _logits(rows, vocab_size, device)
    temperature = torch.linspace(0.3, 2.0, rows, device=device)
    seeds = torch.arange(rows, device=device) * 0x1234567890ABCDE
    positions = torch.arange(rows, device=device) * 37
    none = torch.full((rows,), -torch.inf, device=device)
    drawn = []
    for draw in (triton_sampler, device_draw):
        tokens = draw.gumbel_argmax(draw.scale(logits, temperature), none, seeds, positions)
        drawn.append(torch.cat((tokens, draw.argmax(logits), draw.argmax(logits.to(torch.float16)))))
    return float((drawn[0] != drawn[1]).double().mean())


def _thresholds(vocab_size: int, device: torch.device) -> float:
    rows = 8 if device.type == "cpu" else 64
    scaled = device_draw.scale(_logits(rows, vocab_size, device), torch.ones(rows, device=device))
    index = torch.arange(rows, device=device)
    arguments = (
        torch.where(index % 3 == 0, vocab_size - 1, 1 + index * 7 % 300),
        (0.3 + 0.7 * (index % 8) / 7).double(),
        torch.where(index % 2 == 0, -torch.inf, -4.0),
    )
    ours, expected = (draw.filter_thresholds(scaled, *arguments) for draw in (triton_sampler, device_draw))
    return float((ours - expected).abs().nan_to_num(torch.inf).max())


def _steps(device: torch.device) -> float:
    """1 for a difference."""
    chance = np.random.default_rng(2)
    ours, theirs = DeviceSteps(8, 4096, 32, device), HostSteps(8, 4096, 32, device)
    lengths = [0] * 8
    free = list(range(1, 2000))
    for _ in range(10):
        rows = []
        for slot in chance.permutation(8)[:5].tolist():
            start, n = lengths[slot], 1 if lengths[slot] and chance.random() < 0.5 else int(chance.integers(1, 301))
            blocks = [free.pop() for _ in range(-(-(start + n) // 32) - -(-start // 32))]
            lengths[slot] += n
            tokens = chance.integers(1000, size=n).tolist()
            rows.append(Row(slot=slot, start=start, n=n, tokens=tokens, n_draft=0, sample=True, kv=PagedOps(blocks)))
        rows.sort(key=lambda row: row.n > 1)
        made = ours.inputs(rows, [0, 2]), theirs.inputs(rows, [0, 2])
        for field in fields(made[0]):
            got, expected = (getattr(inputs, field.name) for inputs in made)
            if field.name == "block_table":
                got = got[:, : expected.shape[1]]
                used = torch.arange(expected.shape[1], device=device) * 32 < made[1].seq_lens.unsqueeze(1)
                expected = torch.where(used, expected, 0)
            if not (torch.equal(got, expected) if isinstance(got, Tensor) else got == expected):
                return 1.0
    return 0.0


def _decoder(shape: ModelShape, dtype: torch.dtype, device: torch.device) -> float:
    """Logits of a prefill, then of decodes among a chunk."""
    small = device.type == "cpu"
    results = []
    for ops in (_ops(device), TorchOps()):
        model = random_decoder(shape, ops, dtype, device, 2048)
        cache = KVCache(shape.layers, 100, 32, shape.kv_heads, shape.head_dim, dtype, device)
        steps = HostSteps(4, 2048, 32, device)
        chance = np.random.default_rng(4)
        logits = []
        for work in (((0, 0, 20), (1, 0, 33)), ((0, 20, 1), (1, 33, 1), (2, 0, 40 if small else 700))):
            rows = []
            for slot, start, n in work:
                blocks = range(1 + 30 * slot - -(-start // 32), 1 + 30 * slot - -(-(start + n) // 32))
                tokens = chance.integers(shape.vocab_size, size=n).tolist()
                rows.append(Row(slot=slot, start=start, n=n, tokens=tokens, n_draft=0, sample=True, kv=PagedOps(blocks)))
            with torch.inference_mode():
                logits.append(model.logits(model.forward(steps.inputs(rows, range(len(rows))), cache)))
        results.append(torch.cat(logits))
    return _difference(results[0], results[1])


def _graphs(shape: ModelShape, device: torch.device) -> float:
    """Replays in any order of sizes, against the same steps without a graph."""
    small = device.type == "cpu"
    dtype = torch.float32 if small else torch.bfloat16
    model = random_decoder(shape, _ops(device), dtype, device, 2048)
    cache = KVCache(shape.layers, 200, 32, shape.kv_heads, shape.head_dim, dtype, device)
    with torch.inference_mode():
        graphs = DecodeGraphs(
            lambda inputs: model.logits(model.forward(inputs, cache)),
            max_num_seqs=4 if small else 40,
            max_model_len=2048,
            block_size=32,
            device=device,
            recorder=NoRecorder() if small else None,
        )
        graphs.warm_up()
        worst = 0.0
        for turn, count in enumerate((3, 1, 4) if small else (33, 5, 1, 40, 17, 3, 33)):
            case = AttentionCase(
                sequences=tuple((7 * i + turn, 1) for i in range(count)),
                heads=shape.heads,
                kv_heads=shape.kv_heads,
                head_dim=shape.head_dim,
                block_size=32,
            )
            inputs = build(case, str(device)).inputs
            inputs.token_ids.random_(shape.vocab_size)
            cache.data.normal_()
            expected = model.logits(model.forward(inputs, cache))
            worst = max(worst, _difference(graphs.run(inputs), expected))
    return worst


def make_runner(
    shape: ModelShape, ops: TorchOps, dtype: torch.dtype, device: torch.device, config: EngineConfig, num_blocks: int,
    plain: bool, cache_dtype: torch.dtype | None = None,
) -> ModelRunner:  # fmt: skip
    """A runner around random weights: the one for GPUs, or the plain one."""
    from inferflux_backend_torch.gpu_runner import GpuRunner
    from inferflux_backend_torch.runner import TorchRunner

    assert config.max_model_len is not None
    model = random_decoder(shape, ops, dtype, device, config.max_model_len)
    cache = KVCache(shape.layers, num_blocks, 32, shape.kv_heads, shape.head_dim, cache_dtype or dtype, device)
    info = ModelInfo(vocab_size=shape.vocab_size, max_model_len=config.max_model_len, eos_token_ids=frozenset({2}))
    known = {"model": model, "cache": cache, "num_blocks": num_blocks, "device": device, "model_info": info, "capturable": True}
    loaded = Loaded(**{field.name: known[field.name] for field in fields(Loaded)})  # type: ignore[arg-type]  # by name
    if plain:
        return TorchRunner(loaded, config)
    runner: ModelRunner = GpuRunner(loaded, TorchSettings(), config, None if device.type == "cuda" else NoRecorder())
    return runner


def _runner(shape: ModelShape, device: torch.device) -> float:
    """Whole engines: prefill in chunks, decodes by graphs one step ahead, greedy and seeded requests."""
    small = device.type == "cpu"
    config = EngineConfig(max_num_seqs=4 if small else 16, max_num_batched_tokens=24 if small else 300, max_model_len=512)
    outputs = []
    for plain in (False, True):
        ops = TorchOps() if plain else _ops(device)
        runner = make_runner(shape, ops, torch.float32, device, config, 300, plain)
        runner.warm_up()
        core = EngineCore.around(runner, config, load_plugins())
        chance = np.random.default_rng(6)
        for i in range(3 if small else 24):
            prompt = chance.integers(shape.vocab_size, size=chance.integers(1, 40 if small else 400)).tolist()
            drawing: dict[str, Any] = {"temperature": 1.0, "seed": i, "top_p": 0.9} if i % 2 else {}
            tokens = 4 if small else 40
            core.add(make_request(prompt, request_id=str(i), max_tokens=tokens, ignore_eos=True, **drawing))
        answers: dict[str, list[int]] = {}
        while core.has_requests():
            for output in core.step():
                answers.setdefault(output.request_id, []).extend(output.token_ids)
        core.close()
        outputs.append(answers)
    ours, expected = outputs
    total = sum(map(len, expected.values()))
    same = sum(a == b for name in expected for a, b in zip(ours.get(name, []), expected[name], strict=False))
    return 1.0 - same / total
