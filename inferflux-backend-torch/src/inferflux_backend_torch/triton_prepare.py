"""What a step works on, derived on the GPU from one small buffer of 32-bit integers: one transfer and one launch a step.

The block tables stay on the device, by slot; the host sends only blocks that are new. A token that the step before it sampled
need not have reached the host: the kernel takes it from `last_token`, which is what lets the host plan one step ahead.
"""

# Triton ships no types, so its decorator and the kernel under it are untyped; the launcher is checked in full:
# mypy: allow-untyped-decorators, allow-untyped-defs

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from inferflux_backend_torch.inputs import StepInputs

_TOKENS = 256  # of one sequence, at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRow:
    """One sequence of a step, as the host knows it.

    Attributes:
        slot: row of the resident block table and of `last_token`.
        start: its tokens computed before this step; the step computes [start, start + n).
        tokens: the n known tokens; None means one token, the last that was sampled in this slot.
        num_blocks: blocks in its resident table before this step.
        new_blocks: blocks appended to it now.
    """

    slot: int
    start: int
    tokens: Sequence[int] | None
    num_blocks: int
    new_blocks: Sequence[int] = ()

    @property
    def n(self) -> int:
        return 1 if self.tokens is None else len(self.tokens)


@dataclass(frozen=True, slots=True)
class PackedStep:
    """A step in one buffer, for `prepare`.

        slot [B] | start [B] | num_blocks [B] | query_start [B + 1] | block_start [B + 1] | token [T] | new block [N]

    Attributes:
        buffer: int32, on the host; a token of -1 stands for the last one sampled in the slot.
    """

    buffer: Tensor
    num_seqs: int
    num_tokens: int

    @classmethod
    def pack(cls, rows: Sequence[StepRow], pin_memory: bool = False) -> PackedStep:
        """Lay out the rows, those with a single token first, in the order of `StepInputs`."""
        query_start, block_start, tokens, blocks = [0], [0], list[int](), list[int]()
        for row in rows:
            tokens.extend((-1,) if row.tokens is None else row.tokens)
            blocks.extend(row.new_blocks)
            query_start.append(len(tokens))
            block_start.append(len(blocks))
        fields = ([row.slot for row in rows], [row.start for row in rows], [row.num_blocks for row in rows])
        values = [value for part in (*fields, query_start, block_start, tokens, blocks) for value in part]
        return cls(torch.tensor(values, dtype=torch.int32, pin_memory=pin_memory), len(rows), len(tokens))


# Not specialised on counts that change from step to step: each new value would compile anew.
@triton.jit(do_not_specialize=["num_seqs", "num_tokens"])
def _prepare_kernel(
    packed,  # int32, see PackedStep
    block_tables,  # [slots, M] int32, resident
    last_token,  # [slots] int64, resident
    token_ids,  # [T] int64, and so on: the tensors of StepInputs
    positions,
    slot_mapping,
    query_start,
    seq_lens,
    block_table,  # [B, M] int32
    num_seqs,
    num_tokens,
    block_size,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a sequence. It alone touches the row of its slot, so a barrier of its own threads orders the new blocks."""
    seq = tl.program_id(0)
    slot = tl.load(packed + seq)
    start = tl.load(packed + num_seqs + seq)
    starts = packed + 3 * num_seqs
    first = tl.load(starts + seq)
    end = tl.load(starts + seq + 1)
    blocks = starts + num_seqs + 1
    block_first = tl.load(blocks + seq)
    block_end = tl.load(blocks + seq + 1)
    tokens = blocks + num_seqs + 1
    new_blocks = tokens + num_tokens
    resident = block_tables + slot.to(tl.int64) * M
    known = resident + tl.load(packed + 2 * num_seqs + seq)
    for offset in range(0, block_end - block_first, BLOCK):
        index = offset + tl.arange(0, BLOCK)
        inside = index < block_end - block_first
        tl.store(known + index, tl.load(new_blocks + block_first + index, mask=inside), mask=inside)
    tl.debug_barrier()

    used = (start + end - first + block_size - 1) // block_size
    for offset in range(0, M, BLOCK):
        index = offset + tl.arange(0, BLOCK)
        tl.store(
            block_table + seq.to(tl.int64) * M + index, tl.load(resident + index, mask=index < used, other=0), mask=index < M
        )
    sampled = tl.load(last_token + slot)
    for offset in range(0, end - first, BLOCK):
        index = offset + tl.arange(0, BLOCK)
        inside = index < end - first
        token = tl.load(tokens + first + index, mask=inside, other=0).to(tl.int64)
        position = start + index
        block = tl.load(resident + position // block_size, mask=inside, other=0).to(tl.int64)
        tl.store(token_ids + first + index, tl.where(token < 0, sampled, token), mask=inside)
        tl.store(positions + first + index, position.to(tl.int64), mask=inside)
        tl.store(slot_mapping + first + index, block * block_size + position % block_size, mask=inside)
    tl.store(query_start + seq, first)
    tl.store(seq_lens + seq, start + end - first)
    if seq == num_seqs - 1:
        tl.store(query_start + num_seqs, end)


def prepare(packed: PackedStep, block_tables: Tensor, last_token: Tensor, block_size: int, into: StepInputs) -> None:
    """Fill the leading entries of the tensors of `into`, all but `logits_indices`; what lies behind them is left alone.

    Args:
        block_tables: [slots, M] int32, on the device; the step's new blocks are appended to it.
        last_token: [slots] int64, on the device: the token sampled last in each slot.
        into: tensors of at least the step's size, such as a graph's static ones.
    """
    if packed.num_seqs == 0:
        return
    buffer = packed.buffer.to(block_tables.device, non_blocking=True)
    _prepare_kernel[(packed.num_seqs,)](
        buffer,
        block_tables,
        last_token,
        into.token_ids,
        into.positions,
        into.slot_mapping,
        into.query_start,
        into.seq_lens,
        into.block_table,
        packed.num_seqs,
        packed.num_tokens,
        block_size,
        M=block_tables.shape[1],
        BLOCK=_TOKENS,
    )
