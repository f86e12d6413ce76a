"""What a step costs by the number of tokens it decodes and verifies, as measured with the model that is loaded.

A fixed list of draft lengths would not do: on one CPU a step of 16 tokens takes 7 times as long as one of a single token
with 4-bit weights, and 1.6 times with bfloat16 ones (reference: `docs` of issue 5, measured with both backends).
"""

from __future__ import annotations

import bisect
import itertools
import time
from collections.abc import Iterator, Sequence

from inferflux_core.engine.types import KVOps, PagedOps, Row, SamplingParams, SchedulerOutput, SequenceInit, SequenceOps
from inferflux_core.interfaces import ModelRunner

_CONTEXT = 64  # tokens before those that are verified while measuring, where so many fit
_REPEATS = 3
_MOST_SECONDS = 2.0
_LEARN = 0.1  # weight of a new observation
_RELAX = 0.01  # how fast what was not observed for long follows what is


class VerifyCost:
    """t(T): milliseconds of a step of T tokens in all, all of them decodes and drafts.

    Measured once when the model is loaded, and corrected by every such step afterwards, since contexts grow and machines
    have other things to do. Between the measured sizes, and beyond them, it is linear.
    """

    def __init__(self, sizes: Sequence[int], milliseconds: Sequence[float]) -> None:
        """
        Args:
            sizes: numbers of tokens, ascending; at least two.
            milliseconds: of a step of each size; parallel.
        """
        self._sizes = list(sizes)
        self._measured = list(milliseconds)
        self._factors = [1.0] * len(self._sizes)
        self._correct()

    def _correct(self) -> None:
        products = (measured * factor for measured, factor in zip(self._measured, self._factors, strict=True))
        # More tokens never take less time: where they seem to, the clock was disturbed.
        self._milliseconds = list(itertools.accumulate(products, max))

    @classmethod
    def flat(cls) -> VerifyCost:
        """Drafts cost nothing: for tests, where every draft is to be verified."""
        return cls((1, 2), (1.0, 1.0))

    def predict(self, num_tokens: int) -> float:
        """Milliseconds of a step of so many tokens."""
        sizes = self._sizes
        high = min(max(1, bisect.bisect_left(sizes, num_tokens)), len(sizes) - 1)
        low = high - 1
        share = (num_tokens - sizes[low]) / (sizes[high] - sizes[low])
        first, second = self._milliseconds[low], self._milliseconds[high]
        return first + share * (second - first)

    def observe(self, num_tokens: int, milliseconds: float) -> None:
        """Learn from a step of so many decodes and drafts, and nothing else."""
        predicted = self.predict(num_tokens)
        if not (0.0 < milliseconds < float("inf")) or predicted <= 0.0:
            return
        ratio = milliseconds / predicted
        nearest = min(range(len(self._sizes)), key=lambda i: abs(self._sizes[i] - num_tokens))
        factors = self._factors
        # One odd step must not decide; what the model was measured with is never off by more than the machine can be.
        factors[nearest] *= 1.0 + _LEARN * (min(max(ratio, 0.5), 2.0) - 1.0)
        factors[nearest] = min(max(factors[nearest], 0.05), 50.0)
        for i in range(len(factors)):
            if i != nearest:
                factors[i] += _RELAX * (factors[nearest] - factors[i])
        self._correct()


def measure(runner: ModelRunner, max_draft: int) -> VerifyCost:
    """Time steps of one sequence in slot 0. Leaves nothing that the first sequence to start there does not overwrite."""
    limit = min(runner.caps.max_num_batched_tokens, runner.model_info.max_model_len)
    sizes = list(_sizes(max(2, min(max_draft + 1, limit // 2))))
    milliseconds = [float("inf")] * len(sizes)
    start = min(_CONTEXT, limit - sizes[-1])
    context = [1 + i % (runner.model_info.vocab_size - 1) for i in range(start + sizes[-1])]
    _step(runner, context[:start], 0, _room(runner, len(context)), 0, first=True)
    began = time.monotonic()
    for repeat in range(_REPEATS):
        for i, size in enumerate(sizes):
            if time.monotonic() - began > _MOST_SECONDS and (repeat or i > 1):
                break  # a large model: what is missing is concluded from what there is, and learnt while serving
            tokens = context[start : start + size]
            taken = _step(runner, tokens, start, _again(runner, start), 1 + repeat)
            milliseconds[i] = min(milliseconds[i], taken)
    known = [(size, taken) for size, taken in zip(sizes, milliseconds, strict=True) if taken < float("inf")]
    return VerifyCost([size for size, _ in known], [taken for _, taken in known])


def _sizes(most: int) -> Iterator[int]:
    """Powers of two and the largest, but none near to it: larger steps are concluded from the slope between the last two."""
    size = 1
    while size <= most * 2 // 3:
        yield size
        size *= 2
    yield most


def _step(runner: ModelRunner, tokens: list[int], start: int, kv: KVOps, number: int, *, first: bool = False) -> float:
    row = Row(slot=0, start=start, n=len(tokens), tokens=tokens, n_draft=0 if first else len(tokens) - 1, sample=True, kv=kv)
    plan = SchedulerOutput(step=number, rows=[row], num_tokens=row.n)
    if first:
        params = SamplingParams(max_tokens=1, temperature=0.0)
        plan.start.append(SequenceInit(slot=0, params=params, tokens=tokens, num_prompt_tokens=len(tokens)))
    ticket = runner.launch(plan)
    runner.sample(ticket, None)
    return runner.collect(ticket).device_ms


def _room(runner: ModelRunner, num_tokens: int) -> KVOps:
    spec = runner.kv_cache_spec
    if spec.layout == "paged":
        return PagedOps(range(1, 1 + -(-num_tokens // spec.block_size)))
    return SequenceOps(stream=0, keep_len=0)


def _again(runner: ModelRunner, start: int) -> KVOps:
    return PagedOps() if runner.kv_cache_spec.layout == "paged" else SequenceOps(stream=0, keep_len=start)
