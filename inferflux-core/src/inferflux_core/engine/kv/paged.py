"""Blocks of a paged KV cache, found by the hash of everything up to their end (PagedAttention, arXiv 2309.06180; vLLM v1)."""

from __future__ import annotations

from dataclasses import dataclass

from inferflux_core.engine.kv.manager import NO_MATCH, KVCacheManager, PrefixMatch
from inferflux_core.engine.request import BlockHash, Request
from inferflux_core.engine.types import KVOps, PagedOps
from inferflux_core.interfaces import KVStats

NULL_BLOCK = 0  # padded rows of a backend write here; never handed out


@dataclass(slots=True, eq=False)
class Block:
    """One block. In the free list exactly when nobody refers to it; may be free and still hold a cached prefix."""

    id: int
    refs: int = 0
    hash: BlockHash | None = None
    prev: Block | None = None
    next: Block | None = None


@dataclass(slots=True)
class _Table:
    """Blocks of one sequence; of the first `num_offered` full ones it is settled whether others can find them."""

    blocks: list[Block]
    num_offered: int


class FreeList:
    """Free blocks in the order of reuse, least valuable first. Every operation is O(1).

    head -> [oldest] <-> ... <-> [newest] <- tail
     ^ popped here                  ^ appended here
    """

    def __init__(self, blocks: list[Block]) -> None:
        self._head = Block(-1)
        self._tail = Block(-1)
        self._head.next, self._tail.prev = self._tail, self._head
        self._size = 0
        for block in blocks:
            self.append(block)

    def __len__(self) -> int:
        return self._size

    def append(self, block: Block) -> None:
        assert self._tail.prev is not None
        self._insert(self._tail.prev, block, self._tail)

    def appendleft(self, block: Block) -> None:
        assert self._head.next is not None
        self._insert(self._head, block, self._head.next)

    def popleft(self) -> Block:
        block = self._head.next
        assert block is not None
        assert block is not self._tail, "the caller checks the length first"
        self.remove(block)
        return block

    def remove(self, block: Block) -> None:
        assert block.prev is not None
        assert block.next is not None
        block.prev.next, block.next.prev = block.next, block.prev
        block.prev = block.next = None
        self._size -= 1

    def _insert(self, before: Block, block: Block, after: Block) -> None:
        block.prev, block.next = before, after
        before.next = after.prev = block
        self._size += 1

    def ids(self) -> list[int]:
        """Block ids in the order of reuse."""
        ids = []
        block = self._head.next
        while block is not None and block is not self._tail:
            ids.append(block.id)
            block = block.next
        return ids


class PagedKVCacheManager(KVCacheManager):
    """Reference-counted blocks, an LRU free list, and a dictionary from block hash to block.

    A finished sequence frees its blocks tail first, so that the beginnings of prompts, which others share, live longest.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool) -> None:
        self.block_size = block_size
        self._caching = enable_prefix_caching
        self._blocks = [Block(i) for i in range(num_blocks)]
        self._free = FreeList(self._blocks[NULL_BLOCK + 1 :])
        self._cached: dict[BlockHash, Block] = {}
        self._tables: dict[str, _Table] = {}
        self.min_shared_tokens = 2 * block_size if enable_prefix_caching else None

    def get_computed_blocks(self, request: Request) -> PrefixMatch:
        if not self._caching:
            return NO_MATCH
        blocks: list[Block] = []
        held = 0
        for block_hash in request.block_hashes(self.block_size, len(request.tokens) - 1):
            block = self._cached.get(block_hash)
            if block is None:
                break
            blocks.append(block)
            held += block.refs > 0
        return PrefixMatch(len(blocks) * self.block_size, blocks, held * self.block_size)

    def shorten(self, match: PrefixMatch, to: int) -> PrefixMatch:
        """Whole blocks only: others read those that are shared, so nobody may compute a part of one again."""
        assert isinstance(match.source, list)
        blocks: list[Block] = match.source[: to // self.block_size]
        held = sum(block.refs > 0 for block in blocks)
        return PrefixMatch(len(blocks) * self.block_size, blocks, held * self.block_size)

    def allocate_slots(self, request: Request, upto: int, match: PrefixMatch = NO_MATCH) -> PagedOps | None:
        table = self._tables.get(request.request_id)
        if table is not None and upto <= len(table.blocks) * self.block_size:
            return _NOTHING_NEW
        adopted: list[Block] = match.source if table is None and isinstance(match.source, list) else []
        held = len(adopted) if table is None else len(table.blocks)
        needed = -(-upto // self.block_size) - held
        if needed > len(self._free) - sum(block.refs == 0 for block in adopted):
            return None
        if table is None:
            table = self._tables[request.request_id] = _Table([], len(adopted))
        for block in adopted:
            if block.refs == 0:
                self._free.remove(block)
            block.refs += 1
        new = [self._take() for _ in range(needed)]
        table.blocks += adopted
        table.blocks += new
        return PagedOps([block.id for block in (*adopted, *new)])

    def _take(self) -> Block:
        block = self._free.popleft()
        self._forget(block)
        block.refs = 1
        return block

    def _forget(self, block: Block) -> None:
        if block.hash is not None:
            del self._cached[block.hash]
            block.hash = None

    def cache_blocks(self, request: Request, upto: int) -> None:
        if not self._caching:
            return
        table = self._tables[request.request_id]
        full = upto // self.block_size
        if full <= table.num_offered:
            return
        hashes = request.block_hashes(self.block_size, upto)
        for i in range(table.num_offered, full):
            # Another sequence may have computed the same block first; then ours stays private.
            if hashes[i] not in self._cached:
                table.blocks[i].hash = hashes[i]
                self._cached[hashes[i]] = table.blocks[i]
        table.num_offered = full

    def free(self, request: Request, keep: bool) -> None:
        table = self._tables.pop(request.request_id, None)
        for block in reversed(table.blocks if table is not None else []):
            self._release(block, keep)

    def cancel(self, ops: KVOps) -> None:
        """Nothing to undo: freeing the sequence gives the blocks back."""

    def carry_over(self, ops: KVOps) -> KVOps:
        return ops

    def _release(self, block: Block, keep: bool) -> None:
        block.refs -= 1
        if block.refs:
            return
        if not keep:
            self._forget(block)
        if block.hash is None:
            self._free.appendleft(block)  # worth nothing to anybody: reuse it first
        else:
            self._free.append(block)

    def free_tokens(self) -> int:
        return len(self._free) * self.block_size

    def stats(self) -> KVStats:
        usable = len(self._blocks) - 1
        return KVStats((usable - len(self._free)) * self.block_size, usable * self.block_size)

    def block_table(self, request: Request) -> list[int]:
        """Block ids of a sequence, for tests."""
        table = self._tables.get(request.request_id)
        return [] if table is None else [block.id for block in table.blocks]

    def check_integrity(self) -> None:
        refs = [0] * len(self._blocks)
        for table in self._tables.values():
            for block in table.blocks:
                refs[block.id] += 1
        assert [block.refs for block in self._blocks] == refs, "reference counts differ from the block tables"
        free = self._free.ids()
        assert len(free) == len(self._free), "the free list's length is wrong"
        assert len(set(free)) == len(free), "a block is twice in the free list"
        assert set(free) == {b.id for b in self._blocks[1:] if b.refs == 0}, "free list differs from unreferenced blocks"
        hashed = {b.hash: b for b in self._blocks if b.hash is not None}
        assert hashed == self._cached, "the hash index differs from the blocks"


_NOTHING_NEW = PagedOps()
