"""The click command `inferflux bench`."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from inferflux_core.cli.api_errors import ApiError
from inferflux_core.cli.bench.workloads import NAMES, Name, Workload
from inferflux_core.cli.endpoint import EXAMPLE, Endpoint

if TYPE_CHECKING:
    from inferflux_core.cli.bench.session import Contender

OPEN_LOOP_S = 30  # seconds of load that the default of --requests makes

_OWN_FIELDS = {
    "prompt": "it follows from --workload",
    "model": "give it with --model",
    "max_tokens": "give it with --max-tokens",
    "stream": "times are those of streamed answers",
    "stream_options": "tokens are counted by the usage at a stream's end",
}
"""Fields of a request that only the benchmark sets, and what to do instead."""


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option(
    "--url",
    "urls",
    multiple=True,
    default=[EXAMPLE],
    help="Server; repeat it to compare. The LAST is the reference.",
)
@click.option("--name", "names", multiple=True, help="Label of the server, once for each --url. Default: host:port.")
@click.option(
    "--model",
    "models",
    multiple=True,
    help="Once, or once for each --url. Default: the server's own default.",
)
@click.option(
    "--api-key",
    "api_keys",
    multiple=True,
    envvar="INFERFLUX_BENCH_API_KEY",
    show_envvar=True,
    help="Once, or once for each --url.",
)
@click.option(
    "--body",
    "bodies",
    multiple=True,
    metavar="JSON",
    help="Object whose keys go into each request, or @FILE with one. Once, or once for each --url.",
)
@click.option("--workload", type=click.Choice(NAMES), default="plain", help="What is asked; see above.")
@click.option("-c", "--concurrency", type=click.IntRange(1, 4096), help="Closed loop with so many clients. [default: 4]")
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), help="Open loop: Poisson arrivals a second.")
@click.option(
    "--requests",
    type=click.IntRange(min=1),
    help="Per server and alternation. [default: 4 a client, at least 8; 30 s of --rate]",
)
@click.option("--max-tokens", type=click.IntRange(min=1), help="Tokens of each answer. [default: the workload's]")
@click.option(
    "--prompt-tokens",
    type=click.IntRange(min=8),
    help="Size of what the workload varies. [default: the workload's]",
)
@click.option("--alternations", type=click.IntRange(min=1), default=3, help="How often each server has its turn.")
@click.option("--seed", type=int, default=0, help="Decides all prompts and arrival times.")
@click.option("--timeout", type=click.FloatRange(min=0.1), default=300, help="Longest time for one request, in seconds.")
@click.option(
    "--warmup",
    type=click.IntRange(min=0),
    help="Requests before all, not counted. [default: one a client, at most 8]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document, described above.")
@click.option("--show-diff", is_flag=True, help="Show the first prompt that is answered differently, and both answers.")
def bench(
    urls: tuple[str, ...],
    names: tuple[str, ...],
    models: tuple[str, ...],
    api_keys: tuple[str, ...],
    bodies: tuple[str, ...],
    workload: Name,
    concurrency: int | None,
    rate: float | None,
    requests: int | None,
    max_tokens: int | None,
    prompt_tokens: int | None,
    alternations: int,
    seed: int,
    timeout: float,
    warmup: int | None,
    as_json: bool,
    show_diff: bool,
) -> None:
    """Put load on OpenAI-compatible servers and compare them.

    Streaming requests to /v1/completions, greedy but for the workload novel. With several --url the servers take turns
    (A B A B ...), each alternation sends the same prompts to each of them, and no two alternations share prompts. A
    second benchmark on the same servers wants another --seed, or it finds its prompts in their caches.

    Figures are medians over the alternations. The LAST --url is the reference: a ratio is the median of
    (server / reference), alternation by alternation; for tokens a second more than 1 is better, for times less than 1.

    \b
    Workloads (the size that --prompt-tokens changes; tokens out):
      plain          distinct prompts (110 tokens; 64)
      shared-prefix  a common prefix (840 tokens; 32) and 30 distinct tokens
      turns          conversations of 4 turns, each prompt with all before it (60 new tokens a turn; 32)
      mixed          every 4th prompt is long (1250 tokens; 64) among prompts of 110
      copy           a file to repeat with one edit, the answer begun (320 tokens; 128)
      novel          like plain, sampled at temperature 1: greedy, small models repeat themselves (110 tokens; 64)
      json           a text to answer as an array of objects, by a json_schema in response_format (60 tokens; 64)
      json-new       like json, but each request has a schema that no one has had before (60 tokens; 64)

    To compare settings of one server, give its --url twice, with a --name and a --body each; a cache_salt then keeps one
    from finding its prompts in the other's cache. In a --body null takes away what the workload says:
    {"response_format": null} for json without the schema, {"num_speculative_tokens": 0} for no drafts. What was drafted and
    accepted is read from /metrics of InferFlux and vLLM, before and after each turn.

    A time to first token (TTFT) or latency counts from the sending, with --rate from the scheduled arrival. A gap is the
    time between two arrivals of text within an answer.

    \b
    --json prints {"format": "inferflux-bench/1", "date", "inferflux_version", "python", "platform", "event_loop",
      "parameters": {...}, "failed": requests,
      "servers": [{"name", "url", "model", "version", "body": {...}, "reference": bool,
        "alternations": [{"requests", "failed", "errors": {message: count}, "wall_s", "output_tokens",
          "output_tokens_per_s", "requests_per_s", "ttft_p50_ms", "ttft_p99_ms", "time_per_token_p50_ms",
          "time_per_token_p99_ms", "gap_p50_ms", "gap_p99_ms", "gap_max_ms", "latency_p50_ms", "latency_p99_ms",
          "prompt_tokens", "cached_tokens", "drafted_tokens", "accepted_tokens", "acceptance_ratio", "chunks",
          "short_answers", "estimated_answers", "late_send_p99_ms", "client_cpu_ratio"}],
        "medians": {figure: number}, "ratios": {figure: number} or null,
        "agreement": {"name", "reference", "compared", "identical", "identical_ratio", "first_difference"} or null}]}
    A figure that was not measured is null.

    Exit codes: 0 done, 1 a server cannot be reached or a request failed, 2 wrong usage.
    """
    if concurrency is not None and rate is not None:
        raise click.UsageError("-c and --rate exclude each other: clients that wait, or arrivals that do not")
    if rate is not None and workload == "turns":
        raise click.UsageError("--rate does not go with --workload turns, where a turn waits for the answer before it")

    # What follows costs a fifth of a second to import, which --help should not pay.
    from inferflux_core.cli.bench.report import Parameters, make_report, print_differences, print_report
    from inferflux_core.cli.bench.session import measure

    contenders = _contenders(urls, names, models, api_keys, bodies)
    load = Workload.make(workload, prompt_tokens, max_tokens)
    clients = None if rate is not None else concurrency or 4
    usual_requests = max(8, 4 * clients if clients is not None else math.ceil(OPEN_LOOP_S * (rate or 0)))
    parameters = Parameters(
        workload=load.name,
        description=load.describe(),
        concurrency=clients,
        rate=rate,
        requests=-(-(requests or usual_requests) // load.requests_per_script) * load.requests_per_script,
        max_tokens=load.max_tokens,
        prompt_tokens=load.prompt_tokens,
        alternations=alternations,
        warmup=min(clients or 8, 8) if warmup is None else warmup,
        seed=seed,
        timeout_s=timeout,
    )

    def progress(line: str) -> None:
        if sys.stderr.isatty():
            click.echo(line, err=True)

    try:
        event_loop, targets, runs = measure(contenders, load, parameters, progress)
    except ApiError as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        click.echo("stopped: nothing is reported of a benchmark that was not finished", err=True)
        sys.exit(130)  # what shells expect of a program that Ctrl-C has ended
    report = make_report(parameters, event_loop, targets, runs)
    if as_json:
        click.echo(msgspec.json.encode(report).decode())
    else:
        print_report(report)
    if show_diff:
        print_differences(report, targets, runs, to_stderr=as_json)
    if report.failed:
        sys.exit(1)


def _contenders(
    urls: tuple[str, ...],
    names: tuple[str, ...],
    models: tuple[str, ...],
    api_keys: tuple[str, ...],
    bodies: tuple[str, ...],
) -> list[Contender]:
    from inferflux_core.cli.bench.session import Contender

    count = len(urls)
    if names and len(names) != count:
        raise click.UsageError(f"there are {count} --url and {len(names)} --name. Give one --name for each --url, or none")
    fields = [_body(value) for value in _for_each("--body", bodies, count)]
    keys, wanted = _for_each("--api-key", api_keys, count), _for_each("--model", models, count)
    try:
        endpoints = [Endpoint.parse(url, key) for url, key in zip(urls, keys, strict=True)]
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    labels = list(names) or [f"{endpoint.host}:{endpoint.port}" for endpoint in endpoints]
    if len(set(labels)) != count:
        raise click.UsageError("two servers have the same name. Tell them apart with one --name for each --url")
    return [Contender(*row) for row in zip(labels, endpoints, wanted, fields, strict=True)]


def _for_each(option: str, values: tuple[str, ...], count: int) -> list[str | None]:
    """One value for each server: those given, the one given for all, or none."""
    if len(values) not in (0, 1, count):
        raise click.UsageError(f"there are {count} --url and {len(values)} {option}. Give it once, or once for each --url")
    return list(values) if len(values) == count else [values[0] if values else None] * count


def _body(value: str | None) -> dict[str, Any]:
    if value is None:
        return {}
    try:
        text = Path(value[1:]).read_bytes() if value.startswith("@") else value.encode()
        body = msgspec.json.decode(text, type=dict[str, Any])
    except (OSError, UnicodeError, msgspec.DecodeError) as error:
        raise click.UsageError(f"--body is no JSON object, nor @FILE with one: {error}") from error
    for key, cure in _OWN_FIELDS.items():
        if key in body:
            raise click.UsageError(f"--body cannot set {key!r}: {cure}")
    return body
