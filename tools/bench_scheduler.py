"""Time of the scheduler itself, without a model: `schedule()` and `update_from_output()` with many running sequences.

    python tools/bench_scheduler.py [--sequences 256] [--steps 300]

Prints medians and 99th percentiles in milliseconds a step. Target: less than 1 ms in all at 256 sequences.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Literal

from inferflux_core.engine.loop import EngineCore
from inferflux_core.interfaces import EngineConfig
from inferflux_core.plugins import load_plugins
from inferflux_core.testing.driver import make_request
from inferflux_core.testing.fake_backend import FakeRunner
from inferflux_core.testing.fake_settings import FakeSettings

Times = Sequence[tuple[float, float]]


def loaded_engine(layout: Literal["paged", "sequence"], scheduler: str, sequences: int, steps: int, same: bool) -> EngineCore:
    """An engine in which `sequences` decode, each at another length, and as many wait."""
    length = 1000 + steps + 100
    settings = FakeSettings(layout=layout, num_blocks=sequences * (length // 16 + 2), max_model_len=length)
    config = EngineConfig(max_num_seqs=sequences, max_num_batched_tokens=16384)
    core = EngineCore.around(FakeRunner(settings, config), config, load_plugins(), scheduler)
    for i in range(2 * sequences):
        prompt = [97 + (j * 7 + (0 if same else i * j + i)) % 26 for j in range(200 + (0 if same else i % 800))]
        core.add(make_request(prompt, max_tokens=length - 1000, ignore_eos=True, tenant=f"t{i % 8}"))
    while core.stats().num_running < sequences or core.stats().generation_tokens < 2 * sequences:
        core.step()
    return core


def measure(core: EngineCore, steps: int) -> Times:
    """Seconds of planning and of taking in, for each step."""
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        plan = core.scheduler.schedule()
        planned = time.perf_counter()
        if plan is None:
            break
        ticket = core.runner.launch(plan)
        core.runner.sample(ticket, None)
        output = core.runner.collect(ticket)
        computed = time.perf_counter()
        core.scheduler.update_from_output(plan, output)
        times.append((planned - began, time.perf_counter() - computed))
    return times


def report(name: str, times: Times) -> None:
    total = [a + b for a, b in times]
    columns = ([a for a, _ in times], [b for _, b in times], total)
    medians = "  ".join(f"{statistics.median(column) * 1e3:9.3f}" for column in columns)
    print(f"{name:<28}{medians}  {statistics.quantiles(total, n=100)[98] * 1e3:9.3f}")  # noqa: T201


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=256, help="sequences that decode (default: 256)")
    parser.add_argument("--steps", type=int, default=300, help="steps to measure (default: 300)")
    arguments = parser.parse_args()
    layouts: tuple[Literal["paged", "sequence"], ...] = ("paged", "sequence")
    print(f"{'ms a step':<28}{'schedule':>9}  {'update':>9}  {'total':>9}  {'p99 total':>9}")  # noqa: T201
    for layout in layouts:
        for scheduler in ("fcfs", "fair"):
            core = loaded_engine(layout, scheduler, arguments.sequences, arguments.steps, same=False)
            report(f"{layout}, {scheduler}", measure(core, arguments.steps))
        core = loaded_engine(layout, "fcfs", arguments.sequences, arguments.steps, same=True)
        report(f"{layout}, equal prompts", measure(core, arguments.steps))


if __name__ == "__main__":
    main()
