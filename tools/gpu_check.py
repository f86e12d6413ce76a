"""Checks and measures the torch backend on a GPU, in under ten minutes, with random weights of real shapes.

    python tools/gpu_check.py [--minutes 9.5]       on a machine with a GPU
    python tools/gpu_check.py --interpret           correctness only, small, anywhere: Triton interprets its kernels on the CPU
    python tools/gpu_check.py --compile 90          only whether the kernels compile for a GPU of that capability, anywhere

Needs torch and triton, and of core's dependencies msgspec, pydantic and pluggy; transformers is the baseline where it is there.
Prints tables in Markdown with ratios and the device, and writes the same as JSON to the folder that $OUT names. The exit
status is 1 if a comparison failed; targets that are missed do not change it.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import inspect
import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpu_correctness import Check
    from gpu_speed import Figure

_ROOT = Path(__file__).resolve().parents[1]


def say(line: str = "") -> None:
    """At once, as a run may be cut off."""
    print(line, flush=True)  # noqa: T201 -- a program for the terminal


def probe() -> dict[str, Any]:
    """What this machine has: never read off version numbers."""
    import torch
    import triton

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, interpreted",
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties()
        found["multiprocessors"] = properties.multi_processor_count
        found["memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
    try:
        from torch.nn.attention.varlen import varlen_attn

        found["varlen_attn"] = str(inspect.signature(varlen_attn)).replace("\n", " ")
    except ImportError as error:
        found["varlen_attn"] = f"none: {error}"
    found["grouped_mm"] = hasattr(torch, "_grouped_mm")
    for module in ("transformers", "flash_attn", "flash_attn_interface", "flashinfer", "vllm"):
        found[module] = importlib.util.find_spec(module) is not None
    return found


def check_table(checks: Iterable[Check]) -> list[Check]:
    """Prints each as it comes."""
    say("\n| comparison | error | limit | |\n|---|---|---|---|")
    done = []
    for check in checks:
        say(f"| {check.name} | {check.error:.2e} | {check.limit:.0e} | {'ok' if check.ok else 'FAILED ' + check.note} |")
        done.append(check)
    return done


def figure_table(title: str, figures: Iterable[Figure]) -> list[Figure]:
    """Prints each as it comes."""
    say(f"\n| {title} | figure | baseline | ratio | target | note |\n|---|---|---|---|---|---|")
    done = []
    for figure in figures:
        ratio = "" if figure.ratio is None else f"{figure.ratio:.2f}"
        target = "" if figure.target is None else f"{figure.target:g}" + {True: " met", False: " missed", None: ""}[figure.met]
        say(f"| {figure.name} | {figure.value:.4g} {figure.unit} | {figure.baseline} | {ratio} | {target} | {figure.note} |")
        done.append(figure)
    return done


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interpret", action="store_true", help="correctness only, on the CPU")
    parser.add_argument("--compile", type=int, metavar="CAPABILITY", help="only compile the kernels, for e.g. 90 (Hopper)")
    parser.add_argument("--minutes", type=float, default=9.5, help="after which no further measurement begins (default: 9.5)")
    options = parser.parse_args(arguments)
    began = time.monotonic()

    def within(share: float = 1.0) -> bool:
        return bool(time.monotonic() - began < options.minutes * 60 * share)

    if options.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    for folder in ("inferflux-core/src", "inferflux-backend-torch/src", "tests", "tools"):
        sys.path.insert(0, str(_ROOT / folder))
    if options.compile:
        import gpu_compile

        say("| kernel | shared memory, bytes |\n|---|---|")
        for kernel in gpu_compile.compile_kernels(options.compile):
            say(f"| {kernel.name} | {kernel.shared_memory} |")
        return 0
    import torch

    if not options.interpret and not torch.cuda.is_available():
        say("no GPU here; --interpret compares the kernels on the CPU")
        return 2
    from gpu_correctness import run_checks

    result: dict[str, Any] = {"machine": probe()}
    say("| machine | |\n|---|---|")
    for name, value in result["machine"].items():
        say(f"| {name} | {value} |")
    device = torch.device("cpu" if options.interpret else "cuda")
    checks = check_table(run_checks(device, options.interpret))
    result["checks"] = [dataclasses.asdict(check) for check in checks]
    if not options.interpret:
        import gpu_speed

        limits = gpu_speed.ceilings()
        say(f"\ncopy {limits.bandwidth / 1e12:.2f} TB/s, bfloat16 product {limits.bfloat16 / 1e12:.0f} TFLOP/s")
        result["ceilings"] = dataclasses.asdict(limits)
        # The targets first: tuning takes what time is left.
        targets = figure_table("target", gpu_speed.targets(limits, lambda: within(0.75)))
        tuning = figure_table("tuning", gpu_speed.tune(within))
        result["targets"], result["tuning"] = ([dataclasses.asdict(f) for f in figures] for figures in (targets, tuning))
    failed = [check.name for check in checks if not check.ok]
    say(f"\n{len(checks)} comparisons, {len(failed)} failed; {time.monotonic() - began:.0f} s")
    if out := os.environ.get("OUT"):
        Path(out, "gpu_check.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
