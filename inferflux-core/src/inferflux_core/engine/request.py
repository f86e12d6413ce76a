"""One sequence as the scheduler sees it, and the chained hashes of its token blocks."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from inferflux_core.engine.types import ConstraintState, EngineRequest, SamplingParams

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

        |-- num_computed_tokens --|-- in flight --|-- pending --|
        0                                         |             len(tokens) + num_in_flight
                                                  num_scheduled_tokens

    `tokens` grows at its end only, so other objects may hold on to it together with a length.

    Attributes:
        num_computed_tokens: tokens whose step was collected: their KV is valid and their ids are known.
        num_scheduled_tokens: tokens in steps that were planned; more than computed while such a step is not collected.
        num_in_flight: tokens that planned steps sample and that are not known yet; the first of them may be computed all
            the same, since the device knows it.
        slot: held from admission until the last step that used it is collected.
        draft: guessed tokens after the known ones, to be verified by the step that is being planned.
        num_speculative_tokens: most of them; None leaves it to the engine.
        constraint: what the output must be; None for anything.
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
    num_scheduled_tokens: int = 0
    num_in_flight: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    slot: int | None = None
    started: bool = False
    hashes: list[BlockHash] = field(default_factory=list)
    draft: list[int] = field(default_factory=list)
    num_speculative_tokens: int | None = None
    constraint: ConstraintState | None = None

    @classmethod
    def of(cls, message: EngineRequest, constraint: ConstraintState | None = None) -> Request:
        return cls(
            request_id=message.request_id,
            params=message.params,
            tokens=list(message.prompt_token_ids),
            num_prompt_tokens=len(message.prompt_token_ids),
            root=root_hash(message.cache_salt),
            tenant=message.tenant,
            priority=message.priority,
            arrival_time=message.arrival_time,
            num_speculative_tokens=message.num_speculative_tokens,
            constraint=constraint,
        )

    @property
    def num_pending(self) -> int:
        """Tokens that no step was planned for yet, sampled ones in flight among them."""
        return len(self.tokens) + self.num_in_flight - self.num_scheduled_tokens

    @property
    def is_in_flight(self) -> bool:
        """Whether a step that is not collected yet computes some of it, and so writes its cache."""
        return self.num_scheduled_tokens > self.num_computed_tokens

    @property
    def awaits_last_token(self) -> bool:
        """Whether the last token that it may have is being sampled: there is nothing left to plan."""
        return self.num_in_flight > 0 and self.num_output_tokens + self.num_in_flight >= self.params.max_tokens

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
