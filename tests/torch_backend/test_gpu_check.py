"""The script for machines with a GPU, in the two ways in which it runs without one."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the torch backend is not installed")
if importlib.util.find_spec("triton") is None:  # not imported here: other tests want it imported with its interpreter
    pytest.skip("Triton comes with torch's CUDA builds, elsewhere by pip install triton", allow_module_level=True)

import torch

_ROOT = Path(__file__).parents[2]


def _run(*arguments: str, out: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "OUT")}
    if out is not None:
        environment["OUT"] = str(out)
    command = [sys.executable, "tools/gpu_check.py", *arguments]
    return subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)


def test_comparisons_through_the_interpreter(tmp_path: Path) -> None:
    ran = _run("--interpret", out=tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    result = json.loads((tmp_path / "gpu_check.json").read_text(encoding="utf-8"))
    assert result["machine"]["device"] == "CPU, interpreted"
    assert len(result["checks"]) == 11
    assert f"{len(result['checks'])} comparisons, 0 failed" in ran.stdout


def test_every_kernel_compiles_for_hopper_and_fits_smaller_gpus() -> None:
    """By Triton's own compiler and ptxas, which need no GPU."""
    ran = _run("--compile", "90")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    kernels = re.findall(r"^\| (_\w+_kernel) \| (\d+) \|$", ran.stdout, re.MULTILINE)
    package = _ROOT / "inferflux-backend-torch/src/inferflux_backend_torch"
    defined = {
        name for file in package.glob("triton_*.py") for name in re.findall(r"def (_\w+_kernel)\(", file.read_text("utf-8"))
    }
    assert {name for name, _ in kernels} == defined
    assert max(int(size) for _, size in kernels) <= 99 * 1024  # what a block may have on Ampere's and Ada's consumer GPUs


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_says_that_there_is_no_gpu() -> None:
    ran = _run()
    assert ran.returncode == 2
    assert "no GPU here" in ran.stdout
