"""One benchmark from end to end: finds the models, warms the servers up, and lets them take turns."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from inferflux_core.cli.api_errors import ApiError
from inferflux_core.cli.bench.client import LoadGenerator, Run, Target
from inferflux_core.cli.bench.inquiry import find_model, find_speculated, find_version
from inferflux_core.cli.bench.report import Parameters
from inferflux_core.cli.bench.workloads import Workload
from inferflux_core.cli.endpoint import Endpoint

WARMUP = -1  # the alternation whose prompts warm the servers up: no measured one shares them


class Contender:
    """A server that is to be measured: its name in the report, where it is, the model if the user named one, and what
    every request to it says beyond what the workload says."""

    __slots__ = ("body", "endpoint", "model", "name")

    def __init__(self, name: str, endpoint: Endpoint, model: str | None, body: Mapping[str, Any]) -> None:
        self.name = name
        self.endpoint = endpoint
        self.model = model
        self.body = body


def measure(
    contenders: Sequence[Contender], load: Workload, parameters: Parameters, progress: Callable[[str], None]
) -> tuple[str, list[Target], list[list[Run]]]:
    """Runs the benchmark. `progress` is told in a line what begins.

    Returns:
        The name of the event loop, the targets, and `runs[target][alternation]`.

    Raises:
        ApiError: a server cannot be reached, has no model, or fails every warm-up request.
    """
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    name = "asyncio"
    try:
        import uvloop
    except ImportError:  # it does not exist on Windows
        pass
    else:
        loop_factory, name = uvloop.new_event_loop, "uvloop"
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        targets, runs = runner.run(_session(contenders, load, parameters, progress))
    return name, targets, runs


async def _session(
    contenders: Sequence[Contender], load: Workload, parameters: Parameters, progress: Callable[[str], None]
) -> tuple[list[Target], list[list[Run]]]:
    urls = [contender.endpoint.url for contender in contenders]
    targets = [
        Target(
            name=contender.name,
            endpoint=contender.endpoint,
            model=contender.model or await find_model(contender.endpoint),
            version=await find_version(contender.endpoint),
            body=contender.body,
            cache_salt=contender.name if urls.count(contender.endpoint.url) > 1 else None,
        )
        for contender in contenders
    ]
    for target in targets:
        progress(f"warm-up: {target.name}")
        await _warm_up(target, load, parameters)
    runs: list[list[Run]] = [[] for _ in targets]
    for alternation in range(parameters.alternations):
        scripts = load.scripts(parameters.requests, seed=parameters.seed, alternation=alternation)
        for target, rows in zip(targets, runs, strict=True):
            progress(f"alternation {alternation + 1} of {parameters.alternations}: {target.name}")
            generator = LoadGenerator(target, max_tokens=parameters.max_tokens, timeout_s=parameters.timeout_s)
            before = await find_speculated(target.endpoint)
            if parameters.rate is None:
                run = await generator.closed_loop(scripts, parameters.concurrency or 1)
            else:
                # The same arrival times for each server.
                arrivals = random.Random(f"{parameters.seed}/{alternation}/arrivals")  # noqa: S311 - no secret
                run = await generator.open_loop(scripts, parameters.rate, arrivals)
            if before is not None and (after := await find_speculated(target.endpoint)) is not None:
                run.speculated = after.since(before)
            rows.append(run)
    return targets, runs


async def _warm_up(target: Target, load: Workload, parameters: Parameters) -> None:
    if parameters.warmup == 0:
        return
    scripts = load.scripts(parameters.warmup, seed=parameters.seed, alternation=WARMUP)
    generator = LoadGenerator(target, max_tokens=parameters.max_tokens, timeout_s=parameters.timeout_s)
    run = await generator.closed_loop(scripts, parameters.concurrency or parameters.warmup)
    errors = [sample.error for sample in run.samples if sample.error is not None]
    if len(errors) == len(run.samples):
        raise ApiError(f"{target.name} fails every warm-up request: {errors[0]}")
