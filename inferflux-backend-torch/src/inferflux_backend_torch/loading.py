"""From a model's files to what the runner needs: where it runs, its weights, its cache, and what to say of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from inferflux_backend_torch.cache_size import CacheShape, cache_bytes, choose_lengths, default_block_size
from inferflux_backend_torch.devices import (
    choose_cache_dtype,
    choose_device,
    choose_dtype,
    dtype_name,
    has_triton,
    physical_cores,
)
from inferflux_backend_torch.files import ModelFolder
from inferflux_backend_torch.hf import load_transformers, transformers_bytes
from inferflux_backend_torch.hf_tokens import eos_token_ids
from inferflux_backend_torch.inputs import KVCache, StepInputs
from inferflux_backend_torch.linear import linear_factory
from inferflux_backend_torch.loader import load_decoder
from inferflux_backend_torch.memory import available_memory, check_memory
from inferflux_backend_torch.model import Comm, NoComm
from inferflux_backend_torch.native_ops import native_ops
from inferflux_backend_torch.ops import TorchOps
from inferflux_backend_torch.settings import TorchSettings
from inferflux_backend_torch.shard import WHOLE, Shard
from inferflux_backend_torch.weights import weight_bytes
from inferflux_core.errors import ConfigError
from inferflux_core.interfaces import EngineConfig, ModelFiles, ModelInfo


class Model(Protocol):
    """What computes: this backend's decoder, or transformers' in its place."""

    def forward(self, inputs: StepInputs, cache: KVCache) -> Tensor:
        """Write the step's keys and values to the cache; hidden states [R, H] of the tokens in `inputs.logits_indices`,
        or whatever `logits` takes."""

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, H] -> [R, V]."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that is ready to run.

    Attributes:
        num_blocks: of the cache, block 0 included, which holds padding.
        capturable: whether a step never waits for the device, so that a CUDA graph can hold it.
    """

    model: Model
    cache: KVCache
    num_blocks: int
    device: torch.device
    model_info: ModelInfo
    capturable: bool


def load(
    files: ModelFiles, settings: TorchSettings, config: EngineConfig, shard: Shard = WHOLE, comm: Comm | None = None
) -> Loaded:
    """Load a model, or the part of it that `shard` names.

    Raises:
        ModelFileError: the files cannot be served, or do not fit into memory; found before the memory is taken.
        ConfigError: the device is not there, or settings contradict it.
    """
    folder = ModelFolder.open(files, settings.model_impl)
    device = choose_device(settings.device, shard.rank)
    dtype = choose_dtype(settings, folder.checkpoint.dtype, device)
    cache_dtype = choose_cache_dtype(settings, dtype)
    _check_settings(settings, folder, device, shard)
    eos = eos_token_ids(folder.path, folder.config)
    threads = settings.num_threads or max(1, physical_cores() // shard.size)
    if device.type == "cpu":
        torch.set_num_threads(threads)
    _check_fits(files, settings, folder, dtype, device, shard)
    ops = _ops(device, dtype, cache_dtype)
    blocks_of = partial(CacheShape, block_size=settings.block_size or default_block_size(device), dtype=cache_dtype)
    model: Model
    if folder.decoder is None:
        model = foreign = load_transformers(folder, dtype=dtype, device=device, ops=ops)
        layers, vocab_size, trained = foreign.layers, foreign.vocab_size, foreign.max_position_embeddings
        capturable = False  # hundreds of architectures, many of which look at positions or routes on the host
        shape = blocks_of(num_layers=len(layers), num_kv_heads=layers[0].num_kv_heads, head_dim=layers[0].head_dim)
    else:
        decoder = folder.decoder
        vocab_size, trained = decoder.vocab_size, decoder.max_position_embeddings
        most_kv_heads = -(-decoder.num_kv_heads // shard.size)  # of any rank: all have as many blocks
        shape = blocks_of(num_layers=decoder.num_layers, num_kv_heads=most_kv_heads, head_dim=decoder.head_dim)
        positions = min(config.max_model_len or trained, trained)
        if device.type != "cuda":  # there the cache's size is known before, and rotary tables need not be longer
            positions = choose_lengths(shape, cache_bytes(settings, device), trained, config, files.ref)[1]
        model = own = load_decoder(
            decoder,
            folder.checkpoint,
            dtype=dtype,
            device=device,
            linear=linear_factory(settings.quantization, dtype, device),
            ops=ops,
            max_model_len=positions,
            shard=shard,
            comm=comm or NoComm(),
        )
        layers, capturable = own.layers, own.capturable
    num_blocks, max_model_len = choose_lengths(shape, cache_bytes(settings, device), trained, config, files.ref)
    details = {
        "architecture": folder.architecture,
        "path": "transformers" if folder.decoder is None else "inferflux decoder",
        "parameters": str(sum(math.prod(entry.shape) for entry in folder.checkpoint.tensors.values())),
        "dtype": dtype_name(dtype),
        "quantization": settings.quantization,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "kv_cache_dtype": dtype_name(shape.dtype),
        "kv_cache_tokens": str((num_blocks - 1) * shape.block_size),
    }
    if device.type == "cpu":
        details["threads"] = str(threads)
    info = ModelInfo(
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=eos,
        details=details,
    )
    cache = replace(shape, num_kv_heads=layers[0].num_kv_heads).allocate(num_blocks, device)
    return Loaded(model, cache, num_blocks, device, info, capturable)


def _ops(device: torch.device, dtype: torch.dtype, cache_dtype: torch.dtype) -> TorchOps:
    """The fastest operations there are for the device and these types."""
    if device.type == "cpu":
        return native_ops(dtype, cache_dtype)
    if has_triton(device):
        from inferflux_backend_torch.triton_ops import TritonOps

        return TritonOps()
    return TorchOps()


def _check_settings(settings: TorchSettings, folder: ModelFolder, device: torch.device, shard: Shard) -> None:
    if settings.quantization == "int8" and device.type != "cpu":
        raise ConfigError("quantization 'int8' is for CPUs; leave it out, or set `device` to 'cpu'")
    if folder.decoder is None:
        served = f"{folder.architecture!r} is served by transformers, which has no"
        if settings.quantization != "none":
            raise ConfigError(f"{served} quantization {settings.quantization!r} here; leave it out")
        if shard.size > 1:
            raise ConfigError(f"{served} tensor parallelism here; set `tensor_parallel_size` to 1")


def _check_fits(
    files: ModelFiles, settings: TorchSettings, folder: ModelFolder, dtype: torch.dtype, device: torch.device, shard: Shard
) -> None:
    """Refuse what will not fit, before anything is allocated."""
    decoder = folder.decoder
    what = f"model {files.ref!r} in {dtype_name(dtype)}, beside its KV cache,"
    if decoder is None:
        weights = transformers_bytes(folder, dtype)
        if device.type != "cpu":
            check_memory(weights, available_memory(), f"{what} read into main memory first,")
    else:
        item = 1 if settings.quantization == "int8" else dtype.itemsize
        weights = weight_bytes(decoder, item)
        table = decoder.vocab_size * decoder.hidden_size
        weights += table * (dtype.itemsize - item)  # rows of the embedding are looked up as they are
        if decoder.tie_word_embeddings and device.type == "cpu":
            weights += table * item  # the head's own layout of it
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        available = free - int(total * (1 - settings.gpu_memory_utilization))
    else:
        available = available_memory() - cache_bytes(settings, device)
        what = f"model {files.ref!r} in {dtype_name(dtype)}, beside {settings.kv_cache_mib} MiB of KV cache (`kv_cache_mib`),"
    check_memory(weights // shard.size, available, what)
