"""A model shared by several processes (Megatron-LM, arXiv 1909.08053): rank 0 in the engine process, and its followers."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec

from inferflux_backend_torch.backend import make_runner
from inferflux_backend_torch.communicator import DistributedComm
from inferflux_backend_torch.devices import choose_device
from inferflux_backend_torch.followers import Followers, RankDied
from inferflux_backend_torch.loading import load
from inferflux_backend_torch.rank_messages import Join, Lengths, Plan, Sample, WarmUp
from inferflux_backend_torch.settings import TorchSettings
from inferflux_backend_torch.shard import Shard
from inferflux_core.engine.types import ModelRunnerOutput, SchedulerOutput
from inferflux_core.errors import ModelFileError
from inferflux_core.interfaces import EngineConfig, GrammarMask, ModelFiles, ModelRunner, Ticket


class TensorParallelRunner(ModelRunner):
    """Rank 0's part of the model, in step with the others: they get each plan before it is launched here."""

    def __init__(self, runner: ModelRunner, followers: Followers, comm: DistributedComm) -> None:
        self.model_info = runner.model_info
        self.kv_cache_spec = runner.kv_cache_spec
        self.caps = runner.caps
        self._runner = runner
        self._followers = followers
        self._comm = comm

    @classmethod
    def start(
        cls, files: ModelFiles, settings: TorchSettings, config: EngineConfig, followers: Followers
    ) -> TensorParallelRunner:
        """Load rank 0's part while the followers load theirs; ends them if it fails.

        Raises:
            ModelFileError, ConfigError: a rank can't load its part, or did not live so long.
        """
        shard = Shard(0, settings.tensor_parallel_size)
        try:
            device = choose_device(settings.device, shard.rank)
            followers.wait_started()
            with tempfile.TemporaryDirectory(prefix="inferflux-ranks-") as folder, followers.needed():
                store = str(Path(folder, "store"))
                followers.send(Join(store))
                comm = DistributedComm.join(store, shard, device)

            def agree(lengths: Lengths) -> Lengths:
                every = [lengths, *followers.lengths()]
                agreed = Lengths(min(one.num_blocks for one in every), min(one.max_model_len for one in every))
                followers.send(agreed)
                return agreed

            runner = load_rank(files, settings, config, shard, comm, agree)
        except RankDied as error:
            followers.close(0)
            raise ModelFileError(f"model {files.ref!r} can't be loaded: {error}") from error
        except BaseException:
            followers.close(0)
            raise
        followers.watch(comm.abort)
        return cls(runner, followers, comm)

    def warm_up(self) -> None:
        self._followers.send(WarmUp())
        with self._followers.needed():
            self._runner.warm_up()

    def launch(self, plan: SchedulerOutput) -> Ticket:
        self._followers.send(Plan.of(plan))
        with self._followers.needed():
            return self._runner.launch(plan)

    def sample(self, ticket: Ticket, mask: GrammarMask | None) -> None:
        self._followers.send(Sample.of(mask))
        with self._followers.needed():
            self._runner.sample(ticket, mask)

    def collect(self, ticket: Ticket) -> ModelRunnerOutput:
        with self._followers.needed():
            return self._runner.collect(ticket)

    def close(self) -> None:
        self._followers.end()
        try:
            self._runner.close()
            self._comm.close()
        finally:
            self._followers.close()


def load_rank(
    files: ModelFiles,
    settings: TorchSettings,
    config: EngineConfig,
    shard: Shard,
    comm: DistributedComm,
    agree: Callable[[Lengths], Lengths],
) -> ModelRunner:
    """Load the part of one rank.

    Args:
        agree: from what this rank has room for to what all have room for.
    """
    share = settings.model_copy(update={"kv_cache_mib": max(1, settings.kv_cache_mib // shard.size)})
    loaded = load(files, share, config, shard, comm)
    lengths = agree(Lengths(loaded.num_blocks, loaded.model_info.max_model_len))
    details = {
        **loaded.model_info.details,
        "tensor_parallel_size": str(shard.size),
        "kv_cache_tokens": str((lengths.num_blocks - 1) * loaded.cache.block_size),
    }
    info = msgspec.structs.replace(loaded.model_info, max_model_len=lengths.max_model_len, details=details)
    return make_runner(dataclasses.replace(loaded, num_blocks=lengths.num_blocks, model_info=info), settings, config)
