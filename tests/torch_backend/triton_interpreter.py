"""Lets tests run Triton kernels on the CPU.

Triton interprets its kernels if TRITON_INTERPRET is set when it and they are imported. Another test module may have imported
Triton before (transformers does); the tests of a file then run in a process of their own, as one test.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the torch backend's kernels need torch")
pytest.importorskip("numpy", reason="the Triton interpreter needs numpy")

_set_before = os.environ.get("TRITON_INTERPRET")
os.environ["TRITON_INTERPRET"] = "1"
try:
    pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds, elsewhere by pip install triton")
    with contextlib.suppress(ImportError):
        # The first launch would import it, and it asserts that the variable is set.
        importlib.import_module("triton.experimental.gluon")
    import triton.language as tl

    from inferflux_backend_torch import triton_attention, triton_kernels, triton_ops, triton_sampler, triton_steps
finally:  # other tests start processes that should not inherit it
    if _set_before is None:
        del os.environ["TRITON_INTERPRET"]
    else:
        os.environ["TRITON_INTERPRET"] = _set_before

INTERPRETED = all(
    type(function).__name__ == "InterpretedFunction"
    for function in (tl.cdiv, triton_kernels._rms_norm_kernel, triton_attention._attention_kernel, triton_sampler._best_kernel)
)

__all__ = ["INTERPRETED", "isolate", "triton_attention", "triton_kernels", "triton_ops", "triton_sampler", "triton_steps"]


def isolate(namespace: dict[str, object]) -> None:
    """Put one test that runs the whole file elsewhere in place of the tests of a module, unless they can run here.

    Args:
        namespace: `globals()` at the end of the module.
    """
    if INTERPRETED:
        return
    file = Path(str(namespace["__file__"]))
    for name in [name for name in namespace if name.startswith("test_")]:
        del namespace[name]

    def test_in_a_process_of_its_own() -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
        ran = subprocess.run(command, cwd=file.parents[2], capture_output=True, text=True, check=False, timeout=300)
        assert ran.returncode == 0, ran.stdout + ran.stderr

    namespace["test_in_a_process_of_its_own"] = test_in_a_process_of_its_own
