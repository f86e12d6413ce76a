"""Where a model runs and in which types, from settings, its files and what this machine has."""

from __future__ import annotations

import importlib.util
import os

import torch

from inferflux_backend_torch.settings import TorchSettings
from inferflux_core.errors import ConfigError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "fp8": torch.float8_e4m3fn}
_STORED = {"F32": torch.float32, "F64": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def choose_device(wanted: str, rank: int = 0) -> torch.device:
    """The device of a rank.

    Raises:
        ConfigError: this machine, or this build of torch, does not have it.
    """
    rocm = torch.version.hip is not None
    gpu = torch.cuda.is_available()
    available = {"cuda": gpu and not rocm, "rocm": gpu and rocm, "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(n for n, there in available.items() if there) if wanted == "auto" else wanted
    if not available[name]:
        there = ", ".join(n for n, is_there in available.items() if is_there)
        raise ConfigError(
            f"device {name!r} is not there: torch {torch.__version__} finds {there}; set `device` to one of these, "
            f"or install the build of torch for it"
        )
    if name in ("cuda", "rocm"):  # ROCm's devices are called cuda too
        count = torch.cuda.device_count()
        if rank >= count:
            raise ConfigError(f"tensor parallel rank {rank} needs GPU {rank}, there are {count}; lower `tensor_parallel_size`")
        return torch.device("cuda", rank)
    return torch.device(name)


def choose_dtype(settings: TorchSettings, stored: str, device: torch.device) -> torch.dtype:
    """Type of weights and activations.

    Args:
        stored: prevailing type of the checkpoint, as safetensors names it.
    """
    if settings.dtype != "auto":
        return _DTYPES[settings.dtype]
    dtype = _STORED.get(stored, torch.bfloat16)
    return torch.bfloat16 if dtype is torch.float16 and device.type == "cpu" else dtype


def choose_cache_dtype(settings: TorchSettings, dtype: torch.dtype) -> torch.dtype:
    """Type of the KV cache."""
    return dtype if settings.kv_cache_dtype == "auto" else _DTYPES[settings.kv_cache_dtype]


def has_triton(device: torch.device) -> bool:
    """Whether kernels of our own run there. Triton comes with torch's builds for CUDA and ROCm on Linux."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def physical_cores() -> int:
    """Cores that this process may use; two hyper-threads share the units that products keep busy, and count once."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    allowed = os.sched_getaffinity(0)
    cores = {_siblings(cpu) for cpu in allowed}
    return len(cores) if None not in cores else len(allowed)


def _siblings(cpu: int) -> str | None:
    try:
        with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", encoding="ascii") as file:
            return file.read()
    except OSError:
        return None


def dtype_name(dtype: torch.dtype) -> str:
    """As settings write it."""
    return "fp8" if dtype is torch.float8_e4m3fn else str(dtype).removeprefix("torch.")
