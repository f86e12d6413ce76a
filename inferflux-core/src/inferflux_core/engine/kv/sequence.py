"""Streams of a library that owns its cells (llama.cpp): which stream holds which tokens, and who can copy from whom.

There is no paging to simulate. A stream is copied as a whole and then cut, or taken over in place when nobody runs on it.
Prefixes are found by the same chained block hashes as in the paged manager, then extended token by token.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from inferflux_core.engine.kv.manager import NO_MATCH, KVCacheManager, PrefixMatch
from inferflux_core.engine.request import BlockHash, Request
from inferflux_core.engine.types import KVOps, SequenceOps
from inferflux_core.interfaces import KVCacheSpec, KVStats


@dataclass(slots=True, eq=False)
class Stream:
    """One of the library's sequences.

    Attributes:
        owner: request that runs on it; None when it is free, though it may retain a finished sequence.
        tokens: the sequence's tokens (shared with the request: it only grows); valid up to length.
        length: tokens whose KV is computed.
        reserved: tokens that the owner was promised room for.
        written: cells that the library may hold when they are more than `length`: rejected drafts, until the stream is cut.
        hashes: of the full blocks up to length.
        last_used: logical time of the last release.
    """

    id: int
    owner: str | None = None
    tokens: list[int] = field(default_factory=list)
    length: int = 0
    reserved: int = 0
    written: int = 0
    hashes: list[BlockHash] = field(default_factory=list)
    last_used: int = 0


class SequenceKVCacheManager(KVCacheManager):
    """Assigns streams to sequences so that as little as possible is computed twice.

    Where a new sequence starts:

    1. Nobody has a prefix of it: on the free stream whose content is worth least.
    2. A free stream retains a prefix: on that stream, in place, unless what would be cut off is worth more than a copy.
    3. A running stream has computed a prefix: copied to a free stream, if it is long enough to pay for the copy.
    """

    def __init__(self, spec: KVCacheSpec, enable_prefix_caching: bool, depth: int = 1) -> None:
        self.block_size = spec.block_size
        self.can_trim = spec.can_trim
        self._spec = spec
        self._caching = enable_prefix_caching
        # While a step is in flight, a running stream holds more than its length; copying it and cutting is one way out.
        self._can_copy_running = spec.can_trim or depth == 1
        self._streams = [Stream(i) for i in range(spec.num_streams)]
        self._of: dict[str, Stream] = {}
        self._plain_ops = [SequenceOps(i) for i in range(spec.num_streams)]
        self._index: dict[BlockHash, set[int]] = {}
        # Shared pool only: streams whose cells the library still holds for nobody.
        self._stale: set[int] = set()
        shares = enable_prefix_caching and spec.can_trim  # one that runs has always computed more than the prefix
        self.min_shared_tokens = max(2 * spec.block_size, spec.min_copy_tokens) if shares else None
        self._clock = 0

    # --- finding a prefix ---------------------------------------------------------------------------------------------

    def get_computed_blocks(self, request: Request) -> PrefixMatch:
        if not self._caching:
            return NO_MATCH
        holders: set[int] = set()
        for block_hash in request.block_hashes(self.block_size, len(request.tokens) - 1):
            found = self._index.get(block_hash)
            if not found:
                break
            holders = found
        # The streams of the last matching block agree with the request up to there; some go on a little further.
        matches = ((self._common(request, self._streams[i]), self._streams[i]) for i in holders)
        usable = [(n, stream) for n, stream in matches if self._can_take(n, stream)]
        if not usable:
            return NO_MATCH
        n, stream = max(usable, key=lambda m: (m[0], m[1].owner is None, -m[1].length, -m[1].id))
        return PrefixMatch(n, stream)

    def _common(self, request: Request, stream: Stream) -> int:
        n = 0
        for ours, theirs in zip(request.block_hashes(self.block_size), stream.hashes, strict=False):
            if ours != theirs:
                break
            n += self.block_size
        limit = min(len(request.tokens) - 1, stream.length)
        while n < limit and request.tokens[n] == stream.tokens[n]:
            n += 1
        return min(n, limit)

    def _can_take(self, n: int, stream: Stream) -> bool:
        if not n or (not self._spec.can_trim and n != stream.length):
            return False
        return stream.owner is None or (n >= self._spec.min_copy_tokens and self._can_copy_running)

    # --- giving out streams -------------------------------------------------------------------------------------------

    def allocate_slots(self, request: Request, upto: int, match: PrefixMatch = NO_MATCH) -> SequenceOps | None:
        if upto > self._spec.stream_tokens:
            return None
        stream = self._of.get(request.request_id)
        if stream is not None:
            evicted: tuple[int, ...] = ()
            if upto > stream.reserved:
                made = self._make_room(upto - stream.reserved, spare=(stream,))
                if made is None:
                    return None
                evicted, stream.reserved = made, upto
            ops = self._plain_ops[stream.id]
            if evicted or stream.written:
                keep_len = stream.length if stream.written else None
                ops, stream.written = replace(ops, clear=evicted, keep_len=keep_len), 0
            return ops
        return self._start(request, upto, match)

    def _start(self, request: Request, upto: int, match: PrefixMatch) -> SequenceOps | None:
        donor = match.source if isinstance(match.source, Stream) else None
        stream = self._choose(donor, match.num_tokens)
        if stream is None:
            return None
        evicted = self._make_room_on(stream, upto, donor)
        if evicted is None and donor is not None and donor.owner is None and stream is not donor:
            stream = donor  # a copy needs cells of its own; going on in place does not
            evicted = self._make_room_on(stream, upto, donor)
        if evicted is None:
            return None
        copied = donor is not None and stream is not donor
        self._truncate(stream, match.num_tokens if stream is donor else 0)
        stream.owner = request.request_id
        stream.tokens = request.tokens
        stream.reserved = upto
        stream.written = 0
        stream.length = match.num_tokens
        self._publish(stream, request)
        self._of[request.request_id] = stream
        return SequenceOps(stream.id, donor.id if copied and donor else None, match.num_tokens, evicted)

    def _choose(self, donor: Stream | None, n: int) -> Stream | None:
        """The stream to run on: the donor itself when nobody runs on it and little is lost, else the least valuable one."""
        running = {stream.id for stream in self._of.values()}
        free = [stream for stream in self._streams if stream.owner is None and stream is not donor]
        # A step whose stream ids have gaps costs an extra pass over the weights for each gap, on every step of the
        # sequence's life: that outweighs what a retained prefix may save, so gaps come first, then age.
        victim = min(free, key=lambda s: (_gaps(running, s.id), s.length > 0, s.last_used, s.id), default=None)
        if donor is None or donor.owner is not None:
            return victim
        lost = donor.length - n
        if victim is None or lost <= self._spec.min_copy_tokens or lost <= victim.length // 2:
            return donor
        return victim if n >= self._spec.min_copy_tokens else donor

    def _make_room_on(self, stream: Stream, upto: int, donor: Stream | None) -> tuple[int, ...] | None:
        # Cells that a copy shares with its donor are counted twice: a bound, never too low.
        spare = (stream,) if donor is None else (stream, donor)
        return self._make_room(upto - stream.length, spare)

    def _make_room(self, tokens: int, spare: Iterable[Stream]) -> tuple[int, ...] | None:
        """With a shared pool, drop retained sequences, oldest first, until `tokens` more cells are free. None: no room."""
        if self._spec.pool_tokens is None:
            return ()
        kept = {stream.id for stream in spare}
        missing = tokens - (self._spec.pool_tokens - sum(_cells(s) for s in self._streams))
        evicted = []
        retained = [s for s in self._streams if s.owner is None and s.length and s.id not in kept]
        for stream in sorted(retained, key=lambda s: s.last_used):
            if missing <= 0:
                break
            missing -= _cells(stream)
            evicted.append(stream)
        if missing > 0:
            return None
        for stream in evicted:
            self._truncate(stream, 0)
            stream.written = 0
        cleared = (*sorted(self._stale - kept), *(stream.id for stream in evicted))
        self._stale.clear()
        return cleared

    def cancel(self, ops: KVOps) -> None:
        if isinstance(ops, SequenceOps):
            self._stale.update(ops.clear)
            stream = self._streams[ops.stream]
            stream.written = stream.reserved  # a cut that will not happen

    def carry_over(self, ops: KVOps) -> KVOps:
        if not self._stale or not isinstance(ops, SequenceOps):
            return ops
        cleared = (*ops.clear, *sorted(self._stale))
        self._stale.clear()
        return replace(ops, clear=cleared)

    # --- what is computed ---------------------------------------------------------------------------------------------

    def cache_blocks(self, request: Request, upto: int) -> None:
        stream = self._of[request.request_id]
        stream.length = upto
        self._publish(stream, request)

    def _publish(self, stream: Stream, request: Request) -> None:
        full = stream.length // self.block_size
        if not self._caching or full == len(stream.hashes):
            return
        for block_hash in request.block_hashes(self.block_size, stream.length)[len(stream.hashes) : full]:
            stream.hashes.append(block_hash)
            self._index.setdefault(block_hash, set()).add(stream.id)

    def _truncate(self, stream: Stream, to: int) -> None:
        while len(stream.hashes) > to // self.block_size:
            block_hash = stream.hashes.pop()
            holders = self._index[block_hash]
            holders.discard(stream.id)
            if not holders:
                del self._index[block_hash]
        stream.length = min(stream.length, to)

    def trim(self, request: Request, to: int) -> None:
        stream = self._of[request.request_id]
        stream.written = stream.reserved

    def free(self, request: Request, keep: bool) -> None:
        stream = self._of.pop(request.request_id, None)
        if stream is None:
            return
        self._clock += 1
        stream.owner = None
        stream.reserved = 0
        stream.last_used = self._clock
        if not (keep and self._caching):
            self._truncate(stream, 0)
            stream.written = 0
            if self._spec.pool_tokens is not None:
                self._stale.add(stream.id)

    # --- books --------------------------------------------------------------------------------------------------------

    def free_tokens(self) -> int:
        spec = self._spec
        num_free = sum(stream.owner is None for stream in self._streams)
        if spec.pool_tokens is None:
            return num_free * spec.stream_tokens
        return spec.pool_tokens - sum(_cells(s) for s in self._of.values()) if num_free else 0

    def stats(self) -> KVStats:
        spec = self._spec
        capacity = spec.num_streams * spec.stream_tokens if spec.pool_tokens is None else spec.pool_tokens
        return KVStats(sum(stream.length for stream in self._of.values()), capacity)

    def stream_of(self, request: Request) -> int | None:
        """Stream a request runs on, for tests."""
        stream = self._of.get(request.request_id)
        return None if stream is None else stream.id

    def check_integrity(self) -> None:
        owners = {stream.owner: stream for stream in self._streams if stream.owner is not None}
        assert owners == self._of, "streams and their owners disagree"
        index: dict[BlockHash, set[int]] = {}
        for stream in self._streams:
            assert stream.length <= len(stream.tokens) or stream.length == 0, "a stream is longer than its tokens"
            assert stream.length <= self._spec.stream_tokens, "a stream is longer than its cells"
            assert stream.owner is None or stream.length <= stream.reserved, "a sequence outgrew its room"
            assert stream.owner is None or stream.written <= stream.reserved, "a sequence's drafts outgrew its room"
            expected = stream.length // self.block_size if self._caching else 0
            assert len(stream.hashes) == expected, "a stream's hashes do not match its length"
            for block_hash in stream.hashes:
                index.setdefault(block_hash, set()).add(stream.id)
        assert index == self._index, "the hash index differs from the streams"
        if self._spec.pool_tokens is not None:
            assert sum(_cells(s) for s in self._streams) <= self._spec.pool_tokens, "the pool is oversubscribed"


def _cells(stream: Stream) -> int:
    return max(stream.reserved, stream.length, stream.written)


def _gaps(running: set[int], candidate: int) -> int:
    """Runs of consecutive ids that adding the candidate makes (+1), leaves (0) or joins (-1)."""
    if not running:
        return 0
    return 1 - (candidate - 1 in running) - (candidate + 1 in running)
