"""The header of a safetensors file, read and checked in pure Python before any native code sees the file.

    length of the header u64, little-endian | header, a JSON object | data

    {"__metadata__": {text: text}, NAME: {"dtype": "BF16", "shape": [2, 3], "data_offsets": [BEGIN, END]}, ...}

Offsets count from the beginning of the data. Tensors lie in row-major order, little-endian, and fill the data without holes
or overlaps. Source: README of github.com/huggingface/safetensors, section Format.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from inferflux_backend_torch.model_file import open_regular, parse_object, read_exactly
from inferflux_core.errors import ModelFileError

DTYPE_BYTES: Mapping[str, int] = MappingProxyType(
    {
        "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
        "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
    }
)  # fmt: skip
"""Bytes of one element, by the format's names of dtypes. Sub-byte and complex dtypes are not served and count as unknown."""

FLOATING_DTYPES = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
_MAX_VALUES = 1 << 22  # of the header's JSON, some 800,000 tensors: bounds the memory that a forged header can take
_MAX_DIMENSIONS = 64  # torch's own limit
_MAX_BYTES = 2**63 - 1  # offsets and sizes are int64 in torch
_METADATA = "__metadata__"
_FIELDS = ("dtype", "shape", "data_offsets")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies and what it looks like.

    Attributes:
        dtype: the format's name, a key of `DTYPE_BYTES`.
        shape: elements per dimension, the fastest-varying last; () is a scalar.
        start: bytes from the beginning of its file to its first byte. Old files do not align it to the size of an element.
        end: bytes from the beginning of its file to the byte behind its last one.
        path: its file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    path: Path

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """A checked header.

    Attributes:
        path: the file.
        metadata: free text, such as {"format": "pt"}.
        tensors: by name, in the order of their data.
    """

    path: Path
    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorEntry]


def read_header(path: Path) -> SafetensorsHeader:
    """Read and check the header of a safetensors file.

    Raises:
        ModelFileError: missing, unreadable or no regular file; truncated; a header longer than the file or 100 MB, not UTF-8,
            not a JSON object or with a name twice; unknown dtypes, bad or huge shapes; sizes that contradict shape and
            dtype; tensors outside the data, overlapping, or leaving holes. The message names the file, the tensor, the fault.
    """
    try:
        with open_regular(path) as (fd, size):
            header, data_start = _read(fd, size)
        metadata = _metadata(header.pop(_METADATA, {}))
        entries = [_entry(path, name, value, data_start, size) for name, value in header.items()]
        entries.sort(key=lambda entry: (entry.start, entry.end))
        _check_layout(entries, data_start, size)
    except OSError as error:
        raise ModelFileError(f"{path}: reading the header failed: {error.strerror}") from None
    except ValueError as error:
        raise ModelFileError(f"{path}: not a usable safetensors file: {error}") from None
    return SafetensorsHeader(path, MappingProxyType(metadata), MappingProxyType({entry.name: entry for entry in entries}))


def _read(fd: int, size: int) -> tuple[dict[str, Any], int]:
    """The header's JSON, and the offset at which the data begins."""
    if size < _LENGTH_BYTES:
        _refuse(f"it has {size} bytes, fewer than the {_LENGTH_BYTES} of the header's length; fetch the file again")
    length = int.from_bytes(read_exactly(fd, _LENGTH_BYTES, 0), "little")
    if length > _MAX_HEADER_BYTES:
        _refuse(f"its header claims {length} bytes, more than {_MAX_HEADER_BYTES}; it is something else, or damaged")
    if length > size - _LENGTH_BYTES:
        _refuse(f"truncated: its header takes {length} bytes, but the file ends at byte {size}; fetch the file again")
    data = read_exactly(fd, length, _LENGTH_BYTES)
    if len(data) < length:
        _refuse("truncated while being read")
    if not data.startswith(b"{"):
        _refuse(f"its header begins with {data[:1]!r} instead of {b'{'!r}")
    if data.count(b",") > _MAX_VALUES:
        _refuse(f"its header holds more than {_MAX_VALUES} values; no model has so many")
    try:
        return parse_object(data), _LENGTH_BYTES + length
    except ValueError as error:
        _refuse(f"in its header, {error}")


def _metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        _refuse(f"{_METADATA} is not an object of texts")
    return value


def _entry(path: Path, name: str, value: Any, data_start: int, size: int) -> TensorEntry:
    what = f"tensor {_shown(name)}"
    if not isinstance(value, dict):
        _refuse(f"{what} is described by {_shown(value)} instead of an object")
    if missing := [field for field in _FIELDS if field not in value]:
        _refuse(f"{what} has no {missing[0]!r}")
    if unknown := [field for field in value if field not in _FIELDS]:
        _refuse(f"{what} has the unknown field {unknown[0]!r}")
    dtype, shape, offsets = (value[field] for field in _FIELDS)
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        _refuse(f"{what} has the unknown dtype {_shown(dtype)}; known are {', '.join(DTYPE_BYTES)}")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS:
        _refuse(f"{what} has the shape {_shown(shape)}, not a list of at most {_MAX_DIMENSIONS} dimensions")
    for dimension in shape:
        if not _is_size(dimension):
            _refuse(f"{what} has the dimension {_shown(dimension)}; dimensions are whole numbers from 0 to {_MAX_BYTES}")
    if math.prod(filter(None, shape)) * DTYPE_BYTES[dtype] > _MAX_BYTES:  # without zeros: torch multiplies strides too
        _refuse(f"{what} has the shape {_shown(shape)}, whose number of bytes overflows 64 bits")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        _refuse(f"{what} has the data_offsets {_shown(offsets)}; they are two whole numbers from 0 to {_MAX_BYTES}")
    begin, end = offsets
    if begin > end:
        _refuse(f"{what} ends at offset {end}, before it begins at {begin}")
    if data_start + end > size:
        _refuse(f"truncated: {what} ends at byte {data_start + end}, but the file ends at byte {size}; fetch the file again")
    nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
    if end - begin != nbytes:
        _refuse(f"{what} takes {end - begin} bytes, but {dtype} of shape {_shown(shape)} takes {nbytes}")
    return TensorEntry(name, dtype, tuple(shape), data_start + begin, data_start + end, path)


def _check_layout(entries: list[TensorEntry], data_start: int, size: int) -> None:
    """Each tensor, in the order of the data, must begin where the one before it ends."""
    at, before = data_start, "the header"
    for entry in entries:
        if entry.start < at:
            _refuse(f"tensor {_shown(entry.name)} begins at byte {entry.start} and overlaps {before}, which ends at byte {at}")
        if entry.start > at:
            _refuse(f"bytes {at} to {entry.start}, between {before} and tensor {_shown(entry.name)}, belong to no tensor")
        at, before = entry.end, f"tensor {_shown(entry.name)}"
    if at < size:
        _refuse(f"bytes {at} to {size}, behind {before}, belong to no tensor")


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_BYTES  # not isinstance: True is an int too


_short = reprlib.Repr()
_short.maxstring = _short.maxlong = _short.maxother = 120
_short.maxlist = 8
_shown = _short.repr  # a forged value may be as long as the header


def _refuse(fault: str) -> NoReturn:
    raise ValueError(fault)
