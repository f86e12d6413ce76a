"""Sums and gathers over the ranks of a shared model: gloo between CPUs, NCCL (or RCCL) between GPUs of one machine."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor

from inferflux_backend_torch.shard import Shard
from inferflux_core.errors import ConfigError

# torch's type stubs don't follow its bindings: names are missing, and options that process groups take.
_dist: Any = torch.distributed

_LOOPBACK = "127.0.0.1"
# Ranks are in step with each other, so one that lets the others wait this long hangs. The engine's limit of a step is shorter.
_PATIENCE = timedelta(minutes=10)
_JOIN_PATIENCE = timedelta(minutes=1)


class _Group(Protocol):
    """What gloo's and NCCL's process groups have in common."""

    def allreduce(self, tensors: list[Tensor], options: object) -> Any: ...

    def _allgather_base(self, output: Tensor, tensor: Tensor, options: object) -> Any: ...

    def abort(self) -> None: ...

    def shutdown(self) -> None: ...


class DistributedComm:
    """A `Comm` over a process group of its own: several shared models in one process don't meet in torch's global group."""

    def __init__(self, group: _Group, size: int) -> None:
        self._group = group
        self._size = size
        # Not asynchronous, as torch calls it: on the current stream, where graphs record it; the host does not wait for a GPU.
        self._reduce = _dist.AllreduceOptions()
        self._reduce.asyncOp = False
        self._gather = _dist.distributed_c10d.AllgatherOptions()
        self._gather.asyncOp = False

    @classmethod
    def join(cls, store_path: str, shard: Shard, device: torch.device) -> DistributedComm:
        """Meet the other ranks; returns when all have joined, and nobody needs the store's file any more.

        Only loopback addresses are listened on. Neither gloo nor NCCL asks who connects to them: users of this machine could
        disturb the model, others can't reach it.

        Args:
            store_path: of a file in a folder that nobody else may write to.

        Raises:
            ConfigError: there are no process groups for the device.
            RuntimeError: the others did not come, or left.
        """
        if not torch.distributed.is_available() or device.type not in ("cpu", "cuda"):
            raise ConfigError(
                f"torch {torch.__version__} can't share a model over devices of type {device.type!r}; "
                f"set `tensor_parallel_size` to 1, or `device` to 'cpu'"
            )
        store = _dist.FileStore(store_path, shard.size)
        store.set_timeout(_JOIN_PATIENCE)
        group = _nccl(store, shard, device) if device.type == "cuda" else _gloo(store, shard)
        comm = cls(group, shard.size)
        comm.all_reduce(torch.ones(1, device=device)).item()
        return comm

    def all_reduce(self, x: Tensor) -> Tensor:
        _finish(self._group.allreduce([x], self._reduce))
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        stacked = x.new_empty((self._size * x.shape[0], *x.shape[1:]))
        # What torch.distributed.all_gather_into_tensor calls, which takes registered groups only.
        _finish(self._group._allgather_base(stacked, x.contiguous(), self._gather))
        return torch.cat(stacked.chunk(self._size), dim=-1)

    def abort(self) -> None:
        """End what waits for a rank that is gone; from any thread. Results of this and later calls are worthless."""
        self._group.abort()

    def close(self) -> None:
        """Leave the group. The others may have left already."""
        self._group.shutdown()


def _finish(work: Any) -> None:
    if work is not None:  # on a CPU until it is done, on a GPU until the current stream knows that it has to wait
        work.wait()


def _gloo(store: object, shard: Shard) -> _Group:
    options = _dist.ProcessGroupGloo._Options()
    options._timeout = _PATIENCE
    options._threads = 1
    options._devices = [_dist.ProcessGroupGloo.create_device(hostname=_LOOPBACK)]
    group: _Group = _dist.ProcessGroupGloo(store, shard.rank, shard.size, options)
    return group


def _nccl(store: object, shard: Shard, device: torch.device) -> _Group:
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")  # it would look into the store; followers are watched anyway
    torch.cuda.set_device(device)
    options = _dist.ProcessGroupNCCL.Options()
    options._timeout = _PATIENCE
    group: _Group = _dist.ProcessGroupNCCL(store, shard.rank, shard.size, options)
    return group
