"""The figures of one run, their medians over alternations, the ratios between servers, and whether outputs agree."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import msgspec

from inferflux_core.cli.bench.client import Run, Sample


class Figures(msgspec.Struct, kw_only=True):
    """What one alternation on one server showed. Times in milliseconds, but `wall_s`; None where nothing was measured.

    TTFT and latency count from the sending, in an open loop from the scheduled arrival. A gap is the time between two
    moments at which text arrived; chunks that arrive together are one arrival, as their reader sees them.
    """

    requests: int
    failed: int
    wall_s: float | None = None  # from the first sending to the last text
    output_tokens: int
    output_tokens_per_s: float | None = None
    requests_per_s: float | None = None
    ttft_p50_ms: float | None = None
    ttft_p99_ms: float | None = None
    time_per_token_p50_ms: float | None = None  # (last text - first text) / (tokens - 1), per request
    time_per_token_p99_ms: float | None = None
    gap_p50_ms: float | None = None
    gap_p99_ms: float | None = None
    gap_max_ms: float | None = None
    latency_p50_ms: float | None = None  # until the last text
    latency_p99_ms: float | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    drafted_tokens: int | None = None  # by speculation, as the server counts them
    accepted_tokens: int | None = None
    acceptance_ratio: float | None = None
    chunks: int
    short_answers: int  # answers with fewer tokens than were asked for: the server ignored ignore_eos, or a schema ended them
    estimated_answers: int  # answers without usage, whose tokens are taken to be their chunks
    late_send_p99_ms: float | None = None  # open loop: how long after the schedule the generator sent
    client_cpu_ratio: float  # of one core, taken by the generator itself
    errors: dict[str, int] = msgspec.field(default_factory=dict)


class Difference(msgspec.Struct, kw_only=True):
    """The first request that two servers answered differently. Lengths in characters."""

    alternation: int
    request: int
    turn: int
    common_prefix: int
    length: int
    reference_length: int


class Agreement(msgspec.Struct, kw_only=True):
    """How many requests two servers answered with the very same text; `identical_ratio` is None without any."""

    name: str
    reference: str
    compared: int
    identical: int
    identical_ratio: float | None
    first_difference: Difference | None


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The value below which `percent` of the values lie, interpolated between neighbours; None without values."""
    if not values:
        return None
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def figures_of(run: Run, *, max_tokens: int, scheduled: bool) -> Figures:
    """The figures of one run; `scheduled` says that it was an open loop."""
    answered = [(s, s.answer) for s in run.samples if s.answer is not None and s.answer.arrivals]
    empty = sum(1 for s in run.samples if s.answer is not None and not s.answer.arrivals)
    errors = Counter(s.error for s in run.samples if s.error is not None)
    if empty:
        errors["the answer has no text"] += empty
    tokens = [a.completion_tokens if a.completion_tokens is not None else a.chunks for _, a in answered]
    figures = Figures(
        requests=len(run.samples),
        failed=sum(errors.values()),
        output_tokens=sum(tokens),
        chunks=sum(a.chunks for _, a in answered),
        short_answers=sum(1 for count in tokens if count < max_tokens),
        estimated_answers=sum(1 for _, a in answered if a.completion_tokens is None),
        client_cpu_ratio=run.client_cpu_s / run.elapsed_s if run.elapsed_s else 0.0,
        errors=dict(errors.most_common()),
    )
    if run.speculated is not None:
        figures.drafted_tokens, figures.accepted_tokens = run.speculated.drafted, run.speculated.accepted
        figures.acceptance_ratio = run.speculated.accepted / run.speculated.drafted
    if not answered:
        return figures
    # Failed requests took time from the server too, but only sends and texts that were measured bound the wall time.
    wall = max(a.arrivals[-1] for _, a in answered) - min(a.sent for _, a in answered)
    figures.wall_s = wall
    if wall > 0:
        figures.output_tokens_per_s = sum(tokens) / wall
        figures.requests_per_s = len(answered) / wall
    ttft = [1e3 * (a.arrivals[0] - s.due) for s, a in answered]
    latency = [1e3 * (a.arrivals[-1] - s.due) for s, a in answered]
    per_token = [
        1e3 * (a.arrivals[-1] - a.arrivals[0]) / (count - 1)
        for (_, a), count in zip(answered, tokens, strict=True)
        if count > 1
    ]
    gaps = [1e3 * (later - earlier) for _, a in answered for earlier, later in pairwise(a.arrivals)]
    figures.ttft_p50_ms, figures.ttft_p99_ms = percentile(ttft, 50), percentile(ttft, 99)
    figures.latency_p50_ms, figures.latency_p99_ms = percentile(latency, 50), percentile(latency, 99)
    figures.time_per_token_p50_ms, figures.time_per_token_p99_ms = percentile(per_token, 50), percentile(per_token, 99)
    figures.gap_p50_ms, figures.gap_p99_ms, figures.gap_max_ms = (percentile(gaps, p) for p in (50, 99, 100))
    prompts = [a.prompt_tokens for _, a in answered if a.prompt_tokens is not None]
    cached = [a.cached_tokens for _, a in answered if a.cached_tokens is not None]
    figures.prompt_tokens = sum(prompts) if prompts else None
    figures.cached_tokens = sum(cached) if cached else None
    if scheduled:
        figures.late_send_p99_ms = percentile([1e3 * (a.sent - s.due) for s, a in answered], 99)
    return figures


def numbers(figures: Figures) -> dict[str, float | None]:
    """The figures that can be compared, by name."""
    return {name: value for name, value in msgspec.structs.asdict(figures).items() if name != "errors"}


def medians(alternations: Sequence[Figures]) -> dict[str, float | None]:
    """Each figure's median over the alternations in which it was measured."""
    rows = [numbers(figures) for figures in alternations]
    return {name: _median([row[name] for row in rows]) for name in rows[0]}


def ratios(alternations: Sequence[Figures], reference: Sequence[Figures]) -> dict[str, float | None]:
    """Each figure divided by the reference's of the same alternation: the median of those ratios."""
    pairs = [(numbers(ours), numbers(theirs)) for ours, theirs in zip(alternations, reference, strict=True)]
    return {name: _median([_ratio(ours[name], theirs[name]) for ours, theirs in pairs]) for name in pairs[0][0]}


def agreement(name: str, runs: Sequence[Run], reference: str, reference_runs: Sequence[Run]) -> Agreement:
    """Compares the texts of all requests that both servers answered, alternation by alternation."""
    compared = identical = 0
    first: Difference | None = None
    for alternation, (run, other) in enumerate(zip(runs, reference_runs, strict=True)):
        for ours, theirs in _pairs(run, other):
            compared += 1
            if ours.text == theirs.text:
                identical += 1
            elif first is None:
                first = Difference(
                    alternation=alternation,
                    request=ours.script,
                    turn=ours.turn,
                    common_prefix=_common_prefix(ours.text, theirs.text),
                    length=len(ours.text),
                    reference_length=len(theirs.text),
                )
    ratio = identical / compared if compared else None
    return Agreement(
        name=name,
        reference=reference,
        compared=compared,
        identical=identical,
        identical_ratio=ratio,
        first_difference=first,
    )


def sample_of(run: Run, difference: Difference) -> Sample:
    """The sample that a difference is about."""
    return next(s for s in run.samples if (s.script, s.turn) == (difference.request, difference.turn))


def _pairs(run: Run, other: Run) -> list[tuple[Sample, Sample]]:
    theirs = {(sample.script, sample.turn): sample for sample in other.samples if sample.answer is not None}
    return [
        (sample, theirs[sample.script, sample.turn])
        for sample in run.samples
        if sample.answer is not None and (sample.script, sample.turn) in theirs
    ]


def _common_prefix(one: str, other: str) -> int:
    length = min(len(one), len(other))
    return next((index for index in range(length) if one[index] != other[index]), length)


def _ratio(ours: float | None, theirs: float | None) -> float | None:
    return ours / theirs if ours is not None and theirs else None


def _median(values: Sequence[float | None]) -> float | None:
    measured = [value for value in values if value is not None]
    return statistics.median(measured) if measured else None
