"""What `gpu_check.py` measures on a GPU: tiles of the attention kernel, then the targets of the reference, as ratios."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import triton
from gpu_correctness import make_runner
from gpu_model import LLAMA_1B, LLAMA_8B, QWEN3_06B, ModelShape, random_decoder
from torch import Tensor
from torch.nn import functional

from inferflux_backend_torch import triton_attention, triton_sampler
from inferflux_backend_torch.attention_tiles import Tile, choose_tile
from inferflux_backend_torch.graphs import DecodeGraphs
from inferflux_backend_torch.inputs import KVCache, StepInputs
from inferflux_backend_torch.ops import AttentionLayer
from inferflux_backend_torch.triton_ops import TritonOps
from inferflux_core.engine.loop import EngineCore
from inferflux_core.interfaces import EngineConfig
from inferflux_core.plugins import load_plugins
from inferflux_core.testing.driver import make_request

_BLOCK = 32


@dataclass(frozen=True)
class Figure:
    """One line of a table.

    Attributes:
        ratio: to the baseline; None where there is none.
        target: least ratio that is good; None where none is set.
    """

    name: str
    value: float
    unit: str
    baseline: str = ""
    ratio: float | None = None
    target: float | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        return None if self.ratio is None or self.target is None else self.ratio >= self.target


@dataclass(frozen=True)
class Ceilings:
    """Of this device, measured.

    Attributes:
        bandwidth: bytes read and written each second by a copy.
        bfloat16: operations each second of a large product.
    """

    bandwidth: float
    bfloat16: float


def milliseconds(run: Callable[[], object], repeat_ms: int = 60) -> float:
    """Median, by events, with a cold L2."""
    return float(triton.testing.do_bench(run, warmup=10, rep=repeat_ms, return_mode="median"))


def ceilings() -> Ceilings:
    """A copy of 2 GiB, and a product of 8192 x 8192 matrices of random numbers."""
    source = torch.empty(2**30, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source))
    a, b = torch.randn(2, 8192, 8192, device="cuda").bfloat16()
    product = milliseconds(lambda: a @ b)
    return Ceilings(2 * source.nbytes / copy * 1e3, 2 * 8192**3 / product * 1e3)


# --- attention --------------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """One layer's attention on random values."""

    query: Tensor
    out: Tensor
    layer: AttentionLayer
    inputs: StepInputs
    cache: KVCache

    def run(self, tile: Tile | None = None, segments: int | None = None) -> None:
        sms = torch.cuda.get_device_properties().multi_processor_count
        triton_attention.paged_attention(
            self.query, self.out, self.layer, self.inputs, self.cache, sms, first_seq=0, last_seq=self.inputs.num_seqs,
            max_query_len=self.inputs.max_query_len, tile=tile, segments=segments,
        )  # fmt: skip

    @property
    def cache_bytes(self) -> int:
        """That a decode reads."""
        tokens = sum(self.inputs.host_seq_lens)
        return 2 * tokens * self.layer.kv_size * self.cache.data.element_size()


def bench(shape: ModelShape, lengths: list[int], query_len: int, cache_dtype: torch.dtype = torch.bfloat16) -> Bench:
    """Sequences of these lengths, each with the same number of queries at its end, blocks scattered."""
    seqs, width = len(lengths), -(-max(lengths) // _BLOCK)
    blocks = torch.randperm(seqs * width, device="cuda").int().view(seqs, width) + 1
    cache = KVCache(1, seqs * width + 1, _BLOCK, shape.kv_heads, shape.head_dim, cache_dtype, torch.device("cuda"))
    for part in cache.data[0]:
        part.copy_(torch.randn(part.shape, device="cuda", dtype=torch.bfloat16))
    tokens = seqs * query_len
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    starts = torch.arange(seqs + 1, dtype=torch.int32, device="cuda") * query_len
    none = torch.zeros(tokens, dtype=torch.int64, device="cuda")
    inputs = StepInputs(
        token_ids=none, positions=none, slot_mapping=none, query_start=starts, seq_lens=seq_lens, block_table=blocks,
        logits_indices=none, num_decodes=seqs if query_len == 1 else 0, max_query_len=query_len, max_seq_len=max(lengths),
        host_query_start=list(range(0, tokens + 1, query_len)), host_seq_lens=lengths,
    )  # fmt: skip
    layer = AttentionLayer(
        index=0, num_heads=shape.heads, num_kv_heads=shape.kv_heads, head_dim=shape.head_dim, scale=shape.head_dim**-0.5
    )
    query = torch.randn(tokens, layer.q_size + 2 * layer.kv_size, device="cuda", dtype=torch.bfloat16)
    return Bench(query, query.new_empty(tokens, layer.q_size), layer, inputs, cache)


def tune(within: Callable[[], bool]) -> Iterator[Figure]:
    """The best tile of each kind of launch beside the one that `choose_tile` takes, and likewise segments.

    Args:
        within: whether there is time left.
    """
    fp8 = torch.float8_e4m3fn
    decodes = list(itertools.product([16], [16, 32, 64, 128], [2, 4, 8], [2, 3, 4, 5]))
    prefills = list(itertools.product([64, 128], [32, 64, 128], [4, 8], [2, 3]))
    for name, made, candidates in (
        ("decode 64 x 4096, 8B", bench(LLAMA_8B, [4096] * 64, 1), decodes),
        ("decode 64 x 4096, 8B, fp8", bench(LLAMA_8B, [4096] * 64, 1, fp8), decodes),
        ("decode 256 x 840, 0.6B", bench(QWEN3_06B, [840] * 256, 1), decodes),
        ("prefill 4096, 8B", bench(LLAMA_8B, [4096], 4096), prefills),
        ("prefill 4096, 1B (head_dim 64)", bench(LLAMA_1B, [4096], 4096), prefills),
    ):
        group = made.layer.num_heads // made.layer.num_kv_heads
        chosen = choose_tile(made.inputs.max_query_len, group, made.layer.head_dim, torch.bfloat16)
        times = {chosen: milliseconds(made.run)}
        for candidate in candidates:
            tile = Tile(*candidate)
            if not within():
                break
            try:
                times.setdefault(tile, milliseconds(partial(made.run, tile), 20))
            except triton.runtime.errors.OutOfResources:
                continue
        best = min(times, key=lambda tile: times[tile])
        yield Figure(
            f"tile, {name}", times[chosen], "ms", f"{times[best]:.4f} ms", times[best] / times[chosen], 0.95,
            f"chosen {_tile(chosen)}, best {_tile(best)} of {len(times)}",
        )  # fmt: skip
    for seqs, length in ((1, 8192), (1, 65536), (4, 4096), (16, 4096), (16, 32768), (64, 4096)):
        if not within():
            break
        # One long context among short ones is what a split by the number of sequences alone gets wrong.
        lengths = [length] + [min(length, 1024)] * (seqs - 1)
        made = bench(LLAMA_8B, lengths, 1)
        taken = milliseconds(made.run)
        by_segments = {s: milliseconds(partial(made.run, segments=s), 20) for s in (1, 2, 4, 8, 16, 32, 64)}
        least = min(by_segments, key=lambda s: by_segments[s])
        yield Figure(
            f"segments, 1 x {length} and {seqs - 1} x 1024, 8B", taken, "ms", f"{by_segments[least]:.4f} ms",
            by_segments[least] / taken, 0.9, f"best with {least}",
        )  # fmt: skip


def _tile(tile: Tile) -> str:
    return f"M{tile.block_m} K{tile.keys} W{tile.num_warps} S{tile.num_stages}"


def attention(limits: Ceilings) -> Iterator[Figure]:
    """Decode against the copy's bandwidth, prefill against torch's flash attention."""
    for name, shape, lengths, cache_dtype in (
        ("256 x 840, 0.6B", QWEN3_06B, [840] * 256, torch.bfloat16),
        ("64 x 4096, 8B", LLAMA_8B, [4096] * 64, torch.bfloat16),
        ("16 x 8192, 8B", LLAMA_8B, [8192] * 16, torch.bfloat16),
        ("1 x 65536, 8B", LLAMA_8B, [65536], torch.bfloat16),
        ("64 x 4096, 8B, fp8 cache", LLAMA_8B, [4096] * 64, torch.float8_e4m3fn),
    ):
        made = bench(shape, lengths, 1, cache_dtype)
        taken = milliseconds(made.run)
        rate = made.cache_bytes / taken * 1e3
        yield Figure(
            f"attention, decode {name}", rate / 1e12, "TB/s", f"copy {limits.bandwidth / 1e12:.2f} TB/s",
            rate / limits.bandwidth, 0.75, f"{taken:.3f} ms",
        )  # fmt: skip
    made = bench(LLAMA_8B, [4096], 4096)
    taken = milliseconds(made.run)
    q, k, v = (torch.randn(1, 32, 4096, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    flash = milliseconds(lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=True))
    rate = 4 * 4096**2 / 2 * 32 * 128 / taken * 1e3
    yield Figure(
        "attention, prefill 4096 causal, 8B", rate / 1e12, "TFLOP/s", f"torch's SDPA {flash:.3f} ms", flash / taken, 0.75,
        f"{taken:.3f} ms; the target is 0.55 of FlashAttention 3, which torch does not carry",
    )  # fmt: skip


# --- models -----------------------------------------------------------------------------------------------------------


def single_decode(shape: ModelShape, limits: Ceilings, target: float) -> Figure:
    """One sequence of 512 tokens, forward pass, head and greedy draw as one graph, against the time to read the weights."""
    device = torch.device("cuda")
    model = random_decoder(shape, TritonOps(), torch.bfloat16, device, 1024)
    cache = KVCache(shape.layers, 64, _BLOCK, shape.kv_heads, shape.head_dim, torch.bfloat16, device)
    with torch.inference_mode():
        graphs = DecodeGraphs(
            lambda inputs: triton_sampler.argmax(model.logits(model.forward(inputs, cache))),
            max_num_seqs=1, max_model_len=1024, block_size=_BLOCK, device=device,
        )  # fmt: skip
        inputs = graphs.inputs_for(1, 512)
        assert inputs is not None
        inputs.seq_lens.fill_(512)
        inputs.positions.fill_(511)
        inputs.block_table[0, :16] = torch.arange(1, 17, device=device)
        inputs.slot_mapping.fill_(16 * _BLOCK + 31)
        taken = milliseconds(lambda: graphs.run(inputs))
    floor = 2 * shape.num_weights / limits.bandwidth * 1e3
    return Figure(
        f"decode step, 1 sequence, {shape.name}", taken, "ms", f"weights at copy bandwidth {floor:.3f} ms",
        floor / taken, target,
    )  # fmt: skip


def sampling() -> Iterator[Figure]:
    """256 rows of a large vocabulary."""
    rows, vocab_size = 256, 151936
    logits = torch.randn(rows, vocab_size, device="cuda").bfloat16()
    ones, zeros = torch.ones(rows, device="cuda"), torch.zeros(rows, dtype=torch.int64, device="cuda")
    none = torch.full((rows,), -torch.inf, device="cuda")
    scaled = triton_sampler.scale(logits, ones)
    filters = (zeros + 50, ones.double() * 0.9, none)
    yield Figure("sampler, 256 rows: greedy", milliseconds(lambda: triton_sampler.argmax(logits)), "ms")
    plain = milliseconds(lambda: triton_sampler.gumbel_argmax(triton_sampler.scale(logits, ones), none, zeros, zeros))
    yield Figure("sampler, 256 rows: temperature", plain, "ms")
    thresholds = milliseconds(lambda: triton_sampler.filter_thresholds(scaled, *filters))
    yield Figure("sampler, 256 rows: thresholds of top_k and top_p", thresholds, "ms")
    one = milliseconds(lambda: triton_sampler.filter_thresholds(scaled[:1], *(each[:1] for each in filters)))
    yield Figure("sampler, 1 row: thresholds of top_k and top_p", one, "ms")


def engine(shape: ModelShape, requests: int, tokens: int, cache_dtype: torch.dtype | None = None) -> tuple[float, float]:
    """A whole engine, all requests at once: output tokens a second, and the share of the decode steps that the GPU is idle."""
    device = torch.device("cuda")
    config = EngineConfig(max_num_seqs=requests, max_num_batched_tokens=4096, max_model_len=1024, itl_target_ms=None)
    blocks = requests * 1024 // _BLOCK + 64
    runner = make_runner(shape, TritonOps(), torch.bfloat16, device, config, blocks, False, cache_dtype)
    runner.warm_up()
    core = EngineCore.around(runner, config, load_plugins())
    for timed in (False, True):  # once to record graphs and compile kernels
        for prompt in prompts(shape, requests):
            core.add(make_request(prompt, max_tokens=tokens, ignore_eos=True, salt=str(timed)))
        torch.cuda.synchronize()
        began = time.perf_counter()
        total, decoding, busy, steps = 0, 0.0, 0.0, 0
        while core.has_requests():
            before = core.stats().model_seconds
            at = time.perf_counter()
            produced = sum(len(output.token_ids) for output in core.step())
            if produced == requests and core.has_requests():  # a step in which everyone decodes
                decoding += time.perf_counter() - at
                busy += core.stats().model_seconds - before
                steps += 1
            total += produced
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    core.close()
    return total / seconds, 1.0 - busy / decoding if steps else float("nan")


def prompts(shape: ModelShape, requests: int) -> list[list[int]]:
    """100 to 500 tokens each."""
    chance = np.random.default_rng(0)
    return [chance.integers(shape.vocab_size, size=chance.integers(100, 501)).tolist() for _ in range(requests)]


def transformers_rate(shape: ModelShape, requests: int, tokens: int) -> float:
    """Output tokens a second of transformers' continuous batching with paged SDPA, same sizes and prompts.

    Raises:
        ImportError and others: transformers is not there, or its interface is another one.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3Config

    config = Qwen3Config(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
        vocab_size=shape.vocab_size, tie_word_embeddings=shape.tied, max_position_embeddings=2048,
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).cuda().eval()
    model.set_attn_implementation("paged|sdpa")
    generation = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # Not under inference_mode: it works in a thread of its own, where ours does not hold.
    warm = GenerationConfig(**{**generation.to_dict(), "max_new_tokens": 4})
    model.generate_batch(inputs=prompts(shape, 4), generation_config=warm)
    torch.cuda.synchronize()
    began = time.perf_counter()
    outputs = model.generate_batch(inputs=prompts(shape, requests), generation_config=generation)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    produced = sum(len(output.generated_tokens) for output in outputs.values())
    if produced < requests * tokens:
        raise RuntimeError(f"transformers made {produced} of {requests * tokens} tokens; its log says why")
    return produced / seconds


def engines(within: Callable[[], bool]) -> Iterator[Figure]:
    """Against transformers where it is there, and how idle the GPU is."""
    tokens = 128
    for requests in (32, 256):
        if not within():
            return
        rate, idle = engine(QWEN3_06B, requests, tokens)
        note = ""
        baseline: float | None = None
        try:
            baseline = transformers_rate(QWEN3_06B, requests, tokens) if within() else None
        except Exception as error:
            note = f"transformers not measured: {type(error).__name__}: {error}"
        yield Figure(
            f"engine, {requests} requests, {QWEN3_06B.name}", rate, "tok/s",
            "" if baseline is None else f"transformers paged|sdpa {baseline:.0f} tok/s",
            None if baseline is None else rate / baseline, 10, note,
        )  # fmt: skip
        yield Figure(
            f"forward passes while {requests} decode", 1 - idle, "of the time", "all of it", 1 - idle, 0.97,
            "the rest is sampling and idleness",
        )  # fmt: skip
    if within():
        rate, _ = engine(QWEN3_06B, 256, tokens, torch.float8_e4m3fn)
        yield Figure("engine, 256 requests, fp8 cache", rate, "tok/s")


def targets(limits: Ceilings, within: Callable[[], bool]) -> Iterator[Figure]:
    """The table of the reference, as far as time allows."""
    yield from attention(limits)
    yield from sampling()
    for shape, target in ((QWEN3_06B, 0.4), (LLAMA_1B, 0.55), (LLAMA_8B, 0.75)):
        if within():
            yield single_decode(shape, limits, target)
            torch.cuda.empty_cache()
    yield from engines(within)
