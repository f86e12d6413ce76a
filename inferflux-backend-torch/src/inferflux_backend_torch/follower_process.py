"""A rank of a shared model other than 0: `python -m inferflux_backend_torch.follower_process`, started by `followers.py` only.

Its standard input is one end of a socket pair. It repeats the steps of rank 0 on its own part of the model. All ranks know the
whole logits and draw the same tokens from them, so nothing needs to be said about results.
"""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import signal
import socket
import sys

from inferflux_backend_torch.rank_messages import (
    SPEC,
    TO_FOLLOWER,
    Channel,
    Failed,
    FollowerSpec,
    Join,
    Lengths,
    Plan,
    Sample,
    Started,
    WarmUp,
)
from inferflux_backend_torch.settings import TorchSettings
from inferflux_backend_torch.shard import Shard
from inferflux_core.errors import InferFluxError
from inferflux_core.interfaces import ModelRunner, Ticket

_CANNOT_LOAD = 3
_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Load a part of the model, then follow rank 0 until it ends the channel. Returns the exit status."""
    channel = Channel(socket.socket(fileno=sys.stdin.fileno()))
    try:
        spec = channel.receive(SPEC)
        _tie_to_parent(spec.parent_pid)
        logging.basicConfig(
            level=logging.INFO, stream=sys.stderr, format=f"%(levelname)s %(name)s: rank {spec.rank}: %(message)s"
        )
        serve(spec, channel)
    except InferFluxError as error:
        channel.send(Failed(str(error)))
        return _CANNOT_LOAD
    except EOFError:
        return 1  # rank 0 gave up before everything was loaded
    return 0


def serve(spec: FollowerSpec, channel: Channel) -> None:
    """Load and follow.

    Raises:
        InferFluxError: it can't be loaded.
        EOFError: rank 0 ended the channel before everything was loaded.
    """
    from inferflux_backend_torch.communicator import DistributedComm
    from inferflux_backend_torch.devices import choose_device
    from inferflux_backend_torch.tensor_parallel import load_rank

    settings = TorchSettings.model_validate(spec.settings)
    shard = Shard(spec.rank, spec.size)
    device = choose_device(settings.device, shard.rank)
    channel.send(Started())
    join = channel.receive(TO_FOLLOWER)
    assert isinstance(join, Join)
    comm = DistributedComm.join(join.store, shard, device)

    def agree(lengths: Lengths) -> Lengths:
        channel.send(lengths)
        agreed = channel.receive(TO_FOLLOWER)
        assert isinstance(agreed, Lengths)
        return agreed

    runner = load_rank(spec.files, settings, spec.config, shard, comm, agree)
    follow(runner, channel)
    runner.close()
    comm.close()


def follow(runner: ModelRunner, channel: Channel) -> None:
    """Do what rank 0 does, until it ends the channel: with the same calls in the same order as an engine, see `ModelRunner`."""
    last: Ticket | None = None
    ticket: Ticket | None = None
    while True:
        try:
            message = channel.receive(TO_FOLLOWER)
        except EOFError:
            break
        if isinstance(message, WarmUp):
            runner.warm_up()
        elif isinstance(message, Plan):
            ticket = runner.launch(message.plan())
            if last is not None:
                runner.collect(last)
                last = None
        else:
            assert isinstance(message, Sample)
            assert ticket is not None, "a step is launched before it is sampled"
            runner.sample(ticket, message.mask())
            if runner.caps.depth > 1:
                last = ticket
            else:
                runner.collect(ticket)
            ticket = None
    if last is not None:
        runner.collect(last)


def _tie_to_parent(parent_pid: int | None) -> None:
    """Never outlive rank 0, leave signals to the server, and write no core files full of prompts."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if parent_pid is None:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # rank 0 died before prctl took hold
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
