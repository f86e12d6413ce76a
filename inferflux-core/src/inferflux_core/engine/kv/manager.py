"""What the scheduler knows of a KV cache, whatever its layout."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

from inferflux_core.engine.request import Request
from inferflux_core.engine.types import KVOps
from inferflux_core.interfaces import KVCacheSpec, KVStats


@dataclass(slots=True, frozen=True)
class PrefixMatch:
    """The longest computed prefix that a sequence can take over.

    Attributes:
        num_tokens: always less than the sequence's length, since one token must be computed to get logits.
        source: what the manager that made it needs to take it over; nobody else looks inside.
        num_held: tokens of it that running sequences hold anyway: sharing them takes no room.
    """

    num_tokens: int
    source: object = None
    num_held: int = 0


NO_MATCH = PrefixMatch(0)


class KVCacheManager(ABC):
    """Hands out room for computed tokens. Running out of room is None, a normal answer.

    A sequence goes through `get_computed_blocks` (where can it start), `allocate_slots` before every step (room up to a
    length), `cache_blocks` after it (what is valid now), and `free`. A match is valid until the next call that allocates
    for another sequence. A step may be allocated for before the last one is computed; `free` is called when no step that uses
    the sequence's cache is in flight any more.

    Attributes:
        block_size: tokens of a block, the unit of prefix matching.
        min_shared_tokens: a prefix that a running sequence is still computing is worth waiting for from this many tokens
            on; None if it never is.
    """

    block_size: int
    can_trim: bool = True
    min_shared_tokens: int | None

    @abstractmethod
    def get_computed_blocks(self, request: Request) -> PrefixMatch:
        """Longest cached prefix of a sequence that holds nothing yet. Changes nothing."""

    def shorten(self, match: PrefixMatch, to: int) -> PrefixMatch:
        """A match of at most `to` tokens, whose sequence computes the rest itself. Only when the runner can trim."""
        return replace(match, num_tokens=to)

    @abstractmethod
    def allocate_slots(self, request: Request, upto: int, match: PrefixMatch = NO_MATCH) -> KVOps | None:
        """Make room for tokens[:upto]; with the first call of a sequence, take over the match. None: out of room."""

    @abstractmethod
    def cache_blocks(self, request: Request, upto: int) -> None:
        """tokens[:upto] are computed, by steps that were collected: publish their full blocks for others."""

    def trim(self, request: Request, to: int) -> None:  # noqa: B027  # where cells are overwritten nothing is to be done
        """What a step wrote from position `to` on does not count (rejected drafts). `cache_blocks` was told no more, and the
        room stays the sequence's. Only when the runner can trim."""

    @abstractmethod
    def free(self, request: Request, keep: bool) -> None:
        """The sequence gives everything back; with `keep`, its computed tokens stay for others to find."""

    @abstractmethod
    def cancel(self, ops: KVOps) -> None:
        """A row was taken out of the plan, and its sequence is freed next: its operations will not be carried out."""

    @abstractmethod
    def carry_over(self, ops: KVOps) -> KVOps:
        """These operations, and whatever cancelled ones of the same plan would have done for the other rows."""

    @abstractmethod
    def free_tokens(self) -> int:
        """Tokens for which there is room now, counting what nobody runs on."""

    @abstractmethod
    def stats(self) -> KVStats:
        """How full the cache is with running sequences."""

    @abstractmethod
    def check_integrity(self) -> None:
        """Verify the manager's own books. For tests, after every step.

        Raises:
            AssertionError: what does not add up.
        """


def make_kv_cache_manager(spec: KVCacheSpec, enable_prefix_caching: bool, depth: int = 1) -> KVCacheManager:
    """The manager that the runner's layout names, for steps planned `depth` at a time."""
    if spec.layout == "paged":
        from inferflux_core.engine.kv.paged import PagedKVCacheManager

        return PagedKVCacheManager(spec.num_blocks, spec.block_size, enable_prefix_caching)
    from inferflux_core.engine.kv.sequence import SequenceKVCacheManager

    return SequenceKVCacheManager(spec, enable_prefix_caching, depth)
