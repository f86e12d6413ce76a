"""The CPU kernels in C, where they were built.

Attributes:
    BUILT: whether there are `kernels`.
"""

from __future__ import annotations

import torch  # noqa: F401  # the kernels use the OpenMP runtime that it loads

try:
    from inferflux_backend_torch import _native as kernels

    BUILT = True
except ImportError:  # no compiler at install, or torch without OpenMP
    kernels = None  # type: ignore[assignment]  # nobody uses them unless they are BUILT
    BUILT = False

__all__ = ["BUILT", "kernels"]
