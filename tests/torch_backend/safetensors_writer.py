"""Writes safetensors files, sound and forged ones, byte by byte."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1, "F8_E4M3": 1}


def layout(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Any]:
    """A header for tensors (dtype, shape), one behind the other."""
    header: dict[str, Any] = {}
    at = 0
    for name, (dtype, shape) in tensors.items():
        end = at + SIZES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    return header


def write_raw(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    """Any bytes as the header, stating any length of it."""
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)
    return path


def write_tensors(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> Path:
    """A sound file of zeros."""
    header = layout(tensors)
    size = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    return write_raw(path, json.dumps(header).encode(), bytes(size))
