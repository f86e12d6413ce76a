"""What `inferflux bench` prints: a table for people, one JSON document for programs."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import click
import msgspec

from inferflux_core.cli.bench.client import Run, Target
from inferflux_core.cli.bench.figures import Agreement, Figures, agreement, figures_of, medians, ratios, sample_of
from inferflux_core.cli.table import ABSENT, print_table

MAX_SHOWN_ALTERNATIONS = 5  # more of them are shown as a range
MAX_CHANCE_CACHED = 0.1  # of the prompt tokens; distinct prompts have little more than a first token in common
SHOWN_BODY = 100  # characters of a --body
SHOWN_CHARACTERS = 60  # around the place where two texts part, with --show-diff


class Parameters(msgspec.Struct, kw_only=True):
    """How the load was made."""

    workload: str
    description: str
    concurrency: int | None  # None: an open loop
    rate: float | None  # requests a second; None: a closed loop
    requests: int
    max_tokens: int
    prompt_tokens: int
    alternations: int
    warmup: int
    seed: int
    timeout_s: float


class Server(msgspec.Struct, kw_only=True):
    """One server of the report. `ratios` are to the reference; the reference itself has none."""

    name: str
    url: str
    model: str
    version: str | None
    body: Mapping[str, Any]  # of --body
    reference: bool
    alternations: list[Figures]
    medians: dict[str, float | None]
    ratios: dict[str, float | None] | None
    agreement: Agreement | None


class Report(msgspec.Struct, kw_only=True):
    """The JSON document. `format` changes when a key changes its meaning."""

    format: str = "inferflux-bench/1"
    date: str
    inferflux_version: str
    python: str
    platform: str
    event_loop: str
    parameters: Parameters
    failed: int  # requests, over all servers and alternations
    servers: list[Server]


def make_report(parameters: Parameters, event_loop: str, targets: Sequence[Target], runs: Sequence[Sequence[Run]]) -> Report:
    """The report on `runs[target][alternation]`; the last target is the reference when there are several."""
    scheduled = parameters.rate is not None
    figures = [[figures_of(run, max_tokens=parameters.max_tokens, scheduled=scheduled) for run in rows] for rows in runs]
    last = len(targets) - 1
    servers = [
        Server(
            name=target.name,
            url=target.endpoint.url,
            model=target.model,
            version=target.version,
            body=target.body,
            reference=index == last and last > 0,
            alternations=figures[index],
            medians=medians(figures[index]),
            ratios=ratios(figures[index], figures[last]) if index != last else None,
            agreement=agreement(target.name, runs[index], targets[last].name, runs[last]) if index != last else None,
        )
        for index, target in enumerate(targets)
    ]
    return Report(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        inferflux_version=version("inferflux-core"),
        python=platform.python_version(),
        platform=platform.platform(),
        event_loop=event_loop,
        parameters=parameters,
        failed=sum(figure.failed for rows in figures for figure in rows),
        servers=servers,
    )


# What stands in the table: the label, the figure, its decimals.
_ROWS: tuple[tuple[str, str, int], ...] = (
    ("output tok/s", "output_tokens_per_s", 1),
    ("requests/s", "requests_per_s", 2),
    ("TTFT p50, ms", "ttft_p50_ms", 0),
    ("TTFT p99, ms", "ttft_p99_ms", 0),
    ("time per token p50, ms", "time_per_token_p50_ms", 2),
    ("time per token p99, ms", "time_per_token_p99_ms", 2),
    ("gap p50, ms", "gap_p50_ms", 2),
    ("gap p99, ms", "gap_p99_ms", 1),
    ("gap max, ms", "gap_max_ms", 1),
    ("latency p50, ms", "latency_p50_ms", 0),
    ("latency p99, ms", "latency_p99_ms", 0),
    ("prompt tokens", "prompt_tokens", 0),
    ("of them cached", "cached_tokens", 0),
    ("output tokens", "output_tokens", 0),
    ("drafted tokens", "drafted_tokens", 0),
    ("of them accepted", "accepted_tokens", 0),
    ("acceptance", "acceptance_ratio", 2),
    ("failed requests", "failed", 0),
)


def print_report(report: Report) -> None:
    """Prints the table: each figure's median, the values of the alternations behind it, and the ratios."""
    parameters = report.parameters
    load = f"{parameters.concurrency} clients" if parameters.rate is None else f"{parameters.rate:g} arrivals/s"
    click.echo(
        f"{parameters.workload}: {parameters.description}; {load}, {parameters.requests} requests, "
        f"{parameters.alternations} alternations, seed {parameters.seed}"
    )
    for server in report.servers:
        click.echo(
            f"  {server.name}: {server.url}  model {server.model}  version {server.version or 'unknown'}{_body(server.body)}"
        )
    reference = report.servers[-1].name
    compared = [server for server in report.servers if server.ratios is not None]
    columns = ["median (alternations)", *(server.name for server in report.servers)]
    columns += [f"{server.name} / {reference}" for server in compared]
    rows = [
        [
            label,
            *(_values(server, figure, decimals) for server in report.servers),
            *(_number((server.ratios or {}).get(figure), 2) for server in compared),
        ]
        for label, figure, decimals in _ROWS
        if any(server.medians[figure] is not None for server in report.servers)
    ]
    print_table(columns, rows)
    for server in report.servers:
        for line in _remarks(server, unshared=parameters.workload not in ("shared-prefix", "turns")):
            click.echo(line)


def print_differences(report: Report, targets: Sequence[Target], runs: Sequence[Sequence[Run]], *, to_stderr: bool) -> None:
    """Shows, for each server, the first request that it answered otherwise than the reference, with its prompt."""
    for index, server in enumerate(report.servers):
        difference = server.agreement.first_difference if server.agreement is not None else None
        if difference is None:
            continue
        ours = sample_of(runs[index][difference.alternation], difference)
        theirs = sample_of(runs[-1][difference.alternation], difference)
        start = max(0, difference.common_prefix - SHOWN_CHARACTERS)
        end = difference.common_prefix + SHOWN_CHARACTERS
        click.echo(f"prompt: {ours.prompt!r}", err=to_stderr)
        for name, text in ((targets[index].name, ours.text), (targets[-1].name, theirs.text)):
            shown = f"{name}, characters {start} to {min(end, len(text))}: {text[start:end]!r}"
            click.echo(shown, err=to_stderr)


def _remarks(server: Server, *, unshared: bool) -> list[str]:
    messages: Counter[str] = Counter()
    for figures in server.alternations:
        messages.update(figures.errors)
    short = sum(figures.short_answers for figures in server.alternations)
    estimated = sum(figures.estimated_answers for figures in server.alternations)
    lines = [f"{server.name}: {count} requests failed: {message}" for message, count in messages.items()]
    if short:
        lines.append(
            f"{server.name}: {short} answers are shorter than max_tokens: it may not know ignore_eos, or a schema ended them"
        )
    if estimated:
        lines.append(f"{server.name}: {estimated} answers came without usage; their tokens are estimated from chunks")
    if unshared and any(_cached_ratio(figures) > MAX_CHANCE_CACHED for figures in server.alternations):
        lines.append(f"{server.name}: prompts that share nothing came from its cache. Has it seen this --seed before?")
    if server.agreement is not None:
        lines.append(_agreement_line(server.agreement))
    busy = server.medians["client_cpu_ratio"] or 0.0
    lines.append(f"{server.name}: the load generator took {busy:.0%} of one core")
    return lines


def _body(body: Mapping[str, Any]) -> str:
    if not body:
        return ""
    text = msgspec.json.encode(body).decode()
    return f"  body {text if len(text) <= SHOWN_BODY else text[:SHOWN_BODY] + '...'}"


def _cached_ratio(figures: Figures) -> float:
    return (figures.cached_tokens or 0) / figures.prompt_tokens if figures.prompt_tokens else 0.0


def _agreement_line(found: Agreement) -> str:
    text = f"{found.name}: {found.identical} of {found.compared} outputs are identical to {found.reference}'s"
    first = found.first_difference
    if first is None:
        return text
    turn = f", turn {first.turn}" if first.turn else ""
    return (
        f"{text}; the first that differs: alternation {first.alternation}, request {first.request}{turn}, "
        f"after {first.common_prefix} equal characters of {first.length} and {first.reference_length}"
    )


def _values(server: Server, figure: str, decimals: int) -> str:
    median = server.medians[figure]
    values: list[Any] = [getattr(figures, figure) for figures in server.alternations]
    text = _number(median, decimals)
    if median is None or len(values) == 1:
        return text
    if len(values) <= MAX_SHOWN_ALTERNATIONS:
        return f"{text} ({' '.join(_number(value, decimals) for value in values)})"
    measured = [value for value in values if value is not None]
    return f"{text} ({_number(min(measured), decimals)} to {_number(max(measured), decimals)})"


def _number(value: float | None, decimals: int) -> str:
    return ABSENT if value is None else f"{value:,.{decimals}f}"
