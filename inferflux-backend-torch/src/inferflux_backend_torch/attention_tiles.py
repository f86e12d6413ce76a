"""How the work of paged attention is cut into programs, from sizes that the host knows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Tokens below which a segment is not worth its merge, and above which one segment would keep a whole launch waiting.
_SHORTEST_SEGMENT = 256
_LONGEST_SEGMENT = 8192
_MOST_SEGMENTS = 64
# Programs that keep a multiprocessor of a GPU busy when each waits for memory.
_PROGRAMS_PER_SM = 2


@dataclass(frozen=True, slots=True)
class Tile:
    """Shape of one program's work.

    Attributes:
        block_m: rows of queries, token and head counted; a power of two, at least 16 and at least the GQA group.
        keys: keys of one turn of the loop; a power of two, at least 16.
    """

    block_m: int
    keys: int
    num_warps: int
    num_stages: int


def choose_tile(max_query_len: int, group: int, head_dim: int, dtype: torch.dtype) -> Tile:
    """Tile for the queries of a launch; measured figures belong here (tools/gpu_check.py prints them)."""
    large = head_dim > 128 or dtype == torch.float32
    least = max(16, 1 << (group - 1).bit_length())
    if max_query_len * group <= least:
        return Tile(least, 32, 4, 2 if large else 4)
    if large:
        return Tile(max(64, least), 32, 4, 2)
    return Tile(max(64, least), 64, 4, 2)


def choose_segments(programs: int, max_seq_len: int, num_sms: int, decode: bool) -> int:
    """Into how many segments to split contexts, a power of two.

    Args:
        programs: blocks of queries times KV heads, without a split.
        max_seq_len: of the launch; in a CUDA graph the longest that it serves.
        num_sms: multiprocessors of the GPU.
        decode: sequences differ in length, and the longest must not run alone at the end: one split by it too. The blocks of
            a prefill are many and heavy enough to hide each other.
    """
    wanted = -(-num_sms * _PROGRAMS_PER_SM // programs)
    if decode:
        wanted = max(wanted, -(-max_seq_len // _LONGEST_SEGMENT))
    segments = max(1, min(wanted, max_seq_len // _SHORTEST_SEGMENT, _MOST_SEGMENTS))
    return 1 << (segments - 1).bit_length()
