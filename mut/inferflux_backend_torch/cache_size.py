"""How large the KV cache is, and how long a sequence may get in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from inferflux_backend_torch.inputs import KVCache
from inferflux_backend_torch.settings import TorchSettings
from inferflux_core.errors import ModelFileError
from inferflux_core.interfaces import EngineConfig

_CPU_BLOCK, _GPU_BLOCK = 64, 32
_MIB = 2**20
# Of a GPU's memory, left for activations of the largest step and for what libraries allocate when they are first used.
_GPU_RESERVE = 512 * _MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShape:
    """What one block of a rank's cache holds."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype

    @property
    def block_bytes(self) -> int:
        """Bytes of a block over all layers."""
        return 2 * self.num_layers * self.block_size * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    def allocate(self, num_blocks: int, device: torch.device) -> KVCache:
        """A cache of so many blocks."""
        return KVCache(self.num_layers, num_blocks, self.block_size, self.num_kv_heads, self.head_dim, self.dtype, device)


def default_block_size(device: torch.device) -> int:
    """Tokens of a block: large ones make CPU gathers cheap, small ones waste less of a GPU's memory."""
    return _GPU_BLOCK if device.type == "cuda" else _CPU_BLOCK


def cache_bytes(settings: TorchSettings, device: torch.device) -> int:
    """Memory for the cache. On a GPU what the weights, already loaded, have left of this process's share."""
    if device.type != "cuda":
        return settings.kv_cache_mib * _MIB
    free, total = torch.cuda.mem_get_info(device)
    return int(total * settings.gpu_memory_utilization) - (total - free) - _GPU_RESERVE


def choose_lengths(shape: CacheShape, num_bytes: int, trained: int, config: EngineConfig, ref: str) -> tuple[int, int]:
    """Blocks of the cache, block 0 included, which holds padding, and most tokens of a sequence.

    Args:
        num_bytes: memory to use.
        trained: positions that the model was trained for.

    Raises:
        ModelFileError: not even one sequence of the configured length fits, or none at all.
    """
    num_blocks = num_bytes // shape.block_bytes
    room = (num_blocks - 1) * shape.block_size
    wanted = min(config.max_model_len or shape.block_size, trained)
    if room < wanted:
        needed = (-(-wanted // shape.block_size) + 1) * shape.block_bytes / _MIB
        raise ModelFileError(
            f"model {ref!r}: a KV cache of {max(num_bytes, 0) / _MIB:.0f} MiB holds {max(room, 0)} tokens, and one sequence of "
            f"{wanted} needs {needed:.0f} MiB; lower max_model_len, or raise `kv_cache_mib` (on a GPU `gpu_memory_utilization`)"
        )
    return num_blocks, min(trained, config.max_model_len or room, room)
