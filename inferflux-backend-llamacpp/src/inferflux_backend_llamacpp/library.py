"""llama.cpp as a library: loading it, its log, its constants. The only place that imports `llama_cpp`."""

from __future__ import annotations

import ctypes
import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import llama_cpp

from inferflux_core.errors import ModelFileError

SPLIT_MODES: Mapping[str, int] = {"none": 0, "layer": 1, "row": 2, "tensor": 3}
LOAD_MODES: Mapping[str, int] = {"auto": -1, "none": 0, "mmap": 1, "mlock": 2, "mmap_mlock": 3, "direct_io": 4}
FLASH_ATTENTION: Mapping[str, int] = {"auto": -1, "off": 0, "on": 1}
CACHE_TYPES: Mapping[str, int] = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q5_0": 6,
    "q5_1": 7,
    "q8_0": 8,
    "iq4_nl": 20,
    "bf16": 30,
}
CACHE_TYPE_BYTES: Mapping[str, float] = {
    "f32": 4,
    "f16": 2,
    "bf16": 2,
    "q8_0": 34 / 32,
    "q5_1": 24 / 32,
    "q5_0": 22 / 32,
    "q4_1": 20 / 32,
    "q4_0": 18 / 32,
    "iq4_nl": 18 / 32,
}

_LOG_LEVEL_ERROR = 4

_lock = threading.Lock()
_initialised = False
_errors: deque[str] = deque(maxlen=8)


def _on_log(level: int, text: bytes, _user_data: ctypes.c_void_p) -> None:
    if level == _LOG_LEVEL_ERROR:
        _errors.append(text.decode("utf-8", "replace").strip())


_log_callback = llama_cpp.llama_log_callback(_on_log)  # kept: the library calls it for as long as the process lives


def initialise() -> None:
    """Start the library once in this process, its log kept quiet."""
    global _initialised
    with _lock:
        if not _initialised:
            llama_cpp.llama_log_set(_log_callback, ctypes.c_void_p(0))
            llama_cpp.llama_backend_init()
            _initialised = True


@contextmanager
def errors_as(what: str) -> Iterator[None]:
    """Turn a failure inside the block into a ModelFileError that carries what the library logged about it."""
    _errors.clear()
    try:
        yield
    except LibraryError as error:
        details = "; ".join(dict.fromkeys(line for line in _errors if line))
        raise ModelFileError(f"{what}: {error}" + (f" (llama.cpp: {details})" if details else "")) from error


class LibraryError(Exception):
    """A call of the library returned failure."""


def load_model(path: str, shards: tuple[str, ...], params: Any) -> Any:
    """Load a model from one file, or from all its shards.

    Raises:
        LibraryError: the library refused.
    """
    initialise()
    if len(shards) > 1:
        paths = (ctypes.c_char_p * len(shards))(*(os.fsencode(shard) for shard in shards))
        model = llama_cpp.llama_model_load_from_splits(paths, len(shards), params)
    else:
        model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise LibraryError("the model cannot be loaded")
    return model


def uses_amx() -> bool:
    """Whether this build of the library would run AMX kernels on this CPU."""
    initialise()
    return b"AMX_INT8 = 1" in llama_cpp.llama_print_system_info()


def physical_cores() -> int:
    """Cores this process may run on, hyperthreads counted once: more threads than that only wait for each other."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = set()
    for cpu in allowed:
        topology = f"/sys/devices/system/cpu/cpu{cpu}/topology"
        try:
            with open(f"{topology}/physical_package_id") as package, open(f"{topology}/core_id") as core:
                cores.add((package.read(), core.read()))
        except OSError:
            return len(allowed)
    return max(1, len(cores))
