"""What rank 0 of a shared model and the ranks that follow it say to each other, and the channel between them.

    rank 0 -> follower      Join, Lengths, then WarmUp, or Plan and Sample, as often as there is work; the end of the channel
                            means goodbye
    follower -> rank 0      Started, Lengths; or Failed in place of either. Nothing after that: every rank draws the same tokens

Messages are msgpack, each behind its length. Imports no torch.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec
import numpy as np

from inferflux_core.engine.types import GrammarMask, PagedOps, Row, SamplingParams, SchedulerOutput, SequenceInit
from inferflux_core.interfaces import EngineConfig, ModelFiles

T = TypeVar("T")


class FollowerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a new follower is told first.

    Attributes:
        settings: a `TorchSettings` as plain values.
        rank: from 1 to size - 1.
        parent_pid: rank 0's process, to die with it; None where a thread started the follower that may end sooner.
    """

    files: ModelFiles
    settings: dict[str, Any]
    config: EngineConfig
    rank: int
    size: int
    parent_pid: int | None


class Join(msgspec.Struct, frozen=True, tag=True):
    """Meet the other ranks.

    Attributes:
        store: path of a `torch.distributed.FileStore`.
    """

    store: str


class Lengths(msgspec.Struct, frozen=True, tag=True):
    """Blocks and longest sequence: those that a rank has room for, and then the least of all, which every rank works with."""

    num_blocks: int
    max_model_len: int


class WarmUp(msgspec.Struct, frozen=True, tag=True):
    """Warm up, as all ranks do now."""


class Plan(msgspec.Struct, frozen=True, tag=True):
    """One step. msgspec can't tell a row's two kinds of cache operations apart, so plans travel as plain tuples.

    Attributes:
        rows: slot, start, n, tokens, n_draft, sample, new_blocks.
        start: slot, params, tokens, num_prompt_tokens.
    """

    step: int
    num_tokens: int
    free: Sequence[int]
    start: list[tuple[int, SamplingParams, Sequence[int], int]]
    rows: list[tuple[int, int, int, Sequence[int] | None, int, bool, Sequence[int]]]

    @classmethod
    def of(cls, plan: SchedulerOutput) -> Plan:
        rows = []
        for row in plan.rows:
            assert isinstance(row.kv, PagedOps)
            rows.append((row.slot, row.start, row.n, row.tokens, row.n_draft, row.sample, row.kv.new_blocks))
        start = [(init.slot, init.params, init.tokens, init.num_prompt_tokens) for init in plan.start]
        return cls(plan.step, plan.num_tokens, plan.free, start, rows)

    def plan(self) -> SchedulerOutput:
        """As rank 0 got it from the scheduler."""
        return SchedulerOutput(
            step=self.step,
            rows=[
                Row(slot, start, n, tokens, n_draft, sample, PagedOps(new))
                for slot, start, n, tokens, n_draft, sample, new in self.rows
            ],
            num_tokens=self.num_tokens,
            start=[SequenceInit(*init) for init in self.start],
            free=list(self.free),
        )


class Sample(msgspec.Struct, frozen=True, tag=True):
    """Draw the tokens of the step whose plan came last: all ranks have the same masks, or their next inputs would differ.

    Attributes:
        bits: of a `GrammarMask`, little-endian; empty for no mask.
        num_words: of each of its rows.
    """

    bits: bytes = b""
    num_words: int = 0
    first: dict[int, int] = {}

    @classmethod
    def of(cls, mask: GrammarMask | None) -> Sample:
        if mask is None:
            return cls()
        return cls(mask.bits.astype("<i4").tobytes(), mask.bits.shape[1], dict(mask.first))

    def mask(self) -> GrammarMask | None:
        """As rank 0 got it from the engine."""
        if not self.num_words:
            return None
        return GrammarMask(np.frombuffer(self.bits, dtype="<i4").astype(np.int32).reshape(-1, self.num_words), self.first)


class Started(msgspec.Struct, frozen=True, tag=True):
    """The follower is there, and so is its device."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The follower can't load its part."""

    message: str


SPEC = msgspec.msgpack.Decoder(FollowerSpec)
TO_FOLLOWER: msgspec.msgpack.Decoder[Join | Lengths | WarmUp | Plan | Sample] = msgspec.msgpack.Decoder(
    Join | Lengths | WarmUp | Plan | Sample
)
FROM_FOLLOWER: msgspec.msgpack.Decoder[Started | Lengths | Failed] = msgspec.msgpack.Decoder(Started | Lengths | Failed)
_ENCODER = msgspec.msgpack.Encoder(enc_hook=list)  # a plan's tokens and blocks are sequences of any kind, such as ranges
_LENGTH = struct.Struct("<I")


def encode(message: msgspec.Struct) -> bytes:
    """A message as it goes over the channel."""
    data = _ENCODER.encode(message)
    return _LENGTH.pack(len(data)) + data


class Channel:
    """One end of a socket pair."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._reader = end.makefile("rb")

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: msgspec.Struct) -> None:
        """
        Raises:
            OSError: the other side is gone.
        """
        self.send_encoded(encode(message))

    def send_encoded(self, message: bytes) -> None:
        """Send what `encode` returned."""
        self._socket.sendall(message)

    def receive(self, decoder: msgspec.msgpack.Decoder[T]) -> T:
        """Wait for the next message.

        Raises:
            EOFError: the other side has ended the channel, or is gone.
        """
        try:
            header = self._read(_LENGTH.size)
            return decoder.decode(self._read(*_LENGTH.unpack(header)))
        except ConnectionError as error:
            raise EOFError from error

    def _read(self, size: int) -> bytes:
        data = self._reader.read(size)
        if len(data) < size:
            raise EOFError
        return data

    def end(self) -> None:
        """Nothing more will be sent."""
        self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._reader.close()
        self._socket.close()
