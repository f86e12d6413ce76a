"""Prefixes that running sequences are still computing: waiting for them and sharing is cheaper than computing them twice."""

from __future__ import annotations

from inferflux_core.engine.kv.manager import KVCacheManager
from inferflux_core.engine.request import BlockHash, Request


class PendingPrefixes:
    """Blocks that running sequences will compute, and which one.

    Attributes:
        owners: block hash -> id of the request that computes it.
    """

    def __init__(self, kv: KVCacheManager, least: int) -> None:
        """
        Args:
            kv: the cache that the blocks will be found in.
            least: fewer tokens than this are not worth waiting for.
        """
        self.owners: dict[BlockHash, str] = {}
        self._size = kv.block_size
        self._shares = kv.min_shared_tokens is not None
        self._least = max(kv.min_shared_tokens or 0, least)

    def add(self, request: Request, start: int) -> None:
        """The request was admitted, and will compute its known tokens from position `start` on."""
        if self._shares:
            for block_hash in request.block_hashes(self._size)[start // self._size :]:
                self.owners.setdefault(block_hash, request.request_id)

    def remove(self, request: Request, start: int, upto: int | None = None) -> None:
        """Its tokens[start:upto] are computed; without an end: it runs no longer, and the rest will not be."""
        if self.owners:
            last = None if upto is None else upto // self._size
            for block_hash in request.hashes[start // self._size : last]:
                if self.owners.get(block_hash) == request.request_id:
                    del self.owners[block_hash]

    def covers(self, request: Request, start: int) -> bool:
        """Whether a running sequence is about to compute the blocks of this one from position `start` on."""
        if not self.owners:
            return False
        hashes = request.block_hashes(self._size, len(request.tokens) - 1)
        pending = 0
        for block_hash in hashes[start // self._size :]:
            if block_hash not in self.owners:
                break
            pending += self._size
        return pending >= self._least
