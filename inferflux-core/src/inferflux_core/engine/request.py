"""One sequence as the scheduler sees it, and the chained hashes of its token blocks."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from inferflux_core.engine.types import EngineRequest, SamplingParams

BlockHash = bytes


class RequestStatus(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


def hash_block(parent: BlockHash, tokens: Sequence[int]) -> BlockHash:
    """Hash of a block and everything before it: blake2b-128(parent, token ids).

    128 bits and not 64, because a collision would hand one request the text of another.
    """
    return hashlib.blake2b(array("i", tokens).tobytes(), key=parent, digest_size=16).digest()


def root_hash(cache_salt: str) -> BlockHash:
    """Parent of the first block: prefixes are equal only under equal salts."""
    return hashlib.blake2b(cache_salt.encode(), digest_size=16).digest()


@dataclass(slots=True)
class Request:
    """A sequence from its arrival to its end. Only the scheduler changes it.

        |--- num_computed_tokens ---|--- pending ---|
        0                                           len(tokens)

    `tokens` grows at its end only, so other objects may hold on to it together with a length.
    """

    request_id: str
    params: SamplingParams
    tokens: list[int]
    num_prompt_tokens: int
    root: BlockHash
    tenant: str
    priority: int
    arrival_time: float
    status: RequestStatus = RequestStatus.WAITING
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    slot: int | None = None
    started: bool = False
    hashes: list[BlockHash] = field(default_factory=list)

    @classmethod
    def of(cls, message: EngineRequest) -> Request:
        return cls(
            request_id=message.request_id,
            params=message.params,
            tokens=list(message.prompt_token_ids),
            num_prompt_tokens=len(message.prompt_token_ids),
            root=root_hash(message.cache_salt),
            tenant=message.tenant,
            priority=message.priority,
            arrival_time=message.arrival_time,
        )

    @property
    def num_pending(self) -> int:
        """Known tokens that are not computed yet."""
        return len(self.tokens) - self.num_computed_tokens

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    def block_hashes(self, block_size: int, upto: int | None = None) -> list[BlockHash]:
        """Hashes of the full blocks in tokens[:upto]; kept and extended as the sequence grows."""
        num_blocks = (len(self.tokens) if upto is None else upto) // block_size
        hashes = self.hashes
        if len(hashes) < num_blocks:
            parent = hashes[-1] if hashes else self.root
            for i in range(len(hashes), num_blocks):
                parent = hash_block(parent, self.tokens[i * block_size : (i + 1) * block_size])
                hashes.append(parent)
        return hashes if len(hashes) == num_blocks else hashes[:num_blocks]
