"""From the rows of a plan to the tensors of a step, on the GPU: one transfer of 32-bit integers and one launch.

The block tables stay on the device, by slot; the host sends only blocks that are new. A token that the step before it sampled
need not have reached the host: the kernel takes it from `last_token`, which lets the host plan one step ahead.
"""

# Triton ships no types, so its decorator and the kernel under it are untyped; the class is checked in full:
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs
# ruff: noqa: N803 -- constants of a kernel are written in capitals, as Triton itself does

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from inferflux_backend_torch.inputs import StepInputs
from inferflux_core.engine.types import PagedOps, Row

_TOKENS = 256  # of one sequence, at a time
# In the packed buffer: a token that is still on the device, and the place of a row that is not sampled.
_ON_DEVICE = _NOT_SAMPLED = -1


# Not specialised on counts that change from step to step: each new value would compile anew.
@triton.jit(do_not_specialize=["num_seqs", "num_tokens", "pad_tokens", "num_sampled", "num_logits"])
def _prepare_kernel(
    packed,  # int32: see DeviceSteps._pack
    block_tables,  # [slots, M] int32, resident
    last_token,  # [slots] int64, resident
    sampled_slots,  # [R] int64
    token_ids,  # [T] int64, and so on: the tensors of StepInputs
    positions,
    slot_mapping,
    query_start,
    seq_lens,
    block_table,  # [B, M] int32
    logits_indices,  # [num_logits] int64, of which num_sampled are wanted
    num_seqs,
    num_tokens,
    num_sampled,
    num_logits,
    pad_tokens,  # of each sequence that programs beyond num_seqs make up, in the null block
    block_size,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a sequence. It alone touches the row of its slot, so a barrier of its own threads orders the new blocks."""
    seq = tl.program_id(0)
    table = block_table + seq.to(tl.int64) * M
    if seq >= num_seqs:
        begin = num_tokens + (seq - num_seqs) * pad_tokens
        for offset in range(0, M, BLOCK):
            index = offset + tl.arange(0, BLOCK)
            tl.store(table + index, tl.zeros([BLOCK], tl.int32), mask=index < M)
        for offset in range(0, pad_tokens, BLOCK):
            index = offset + tl.arange(0, BLOCK)
            inside = index < pad_tokens
            tl.store(token_ids + begin + index, tl.zeros([BLOCK], tl.int64), mask=inside)
            tl.store(positions + begin + index, index.to(tl.int64), mask=inside)
            tl.store(slot_mapping + begin + index, index.to(tl.int64), mask=inside)
        tl.store(query_start + seq + 1, begin + pad_tokens)
        tl.store(seq_lens + seq, pad_tokens)
        return

    slot = tl.load(packed + seq)
    start = tl.load(packed + num_seqs + seq)
    held = tl.load(packed + 2 * num_seqs + seq)
    place = tl.load(packed + 3 * num_seqs + seq)
    num_drafts = tl.load(packed + 4 * num_seqs + seq)
    starts = packed + 5 * num_seqs
    begin = tl.load(starts + seq)
    end = tl.load(starts + seq + 1)
    new = starts + num_seqs + 1
    new_begin = tl.load(new + seq)
    num_new = tl.load(new + seq + 1) - new_begin
    tokens = new + num_seqs + 1
    new_blocks = tokens + num_tokens + new_begin
    resident = block_tables + slot.to(tl.int64) * M
    for offset in range(0, num_new, BLOCK):
        index = offset + tl.arange(0, BLOCK)
        inside = index < num_new
        tl.store(resident + held + index, tl.load(new_blocks + index, mask=inside, other=0), mask=inside)
    tl.debug_barrier()

    length = start + end - begin
    used = (length + block_size - 1) // block_size
    for offset in range(0, M, BLOCK):
        index = offset + tl.arange(0, BLOCK)
        tl.store(table + index, tl.load(resident + index, mask=index < used, other=0), mask=index < M)
    sampled = tl.load(last_token + slot)
    for offset in range(0, end - begin, BLOCK):
        index = offset + tl.arange(0, BLOCK)
        inside = index < end - begin
        token = tl.load(tokens + begin + index, mask=inside, other=0).to(tl.int64)
        position = start + index
        block = tl.load(resident + position // block_size, mask=inside, other=0).to(tl.int64)
        tl.store(token_ids + begin + index, tl.where(token < 0, sampled, token), mask=inside)
        tl.store(positions + begin + index, position.to(tl.int64), mask=inside)
        tl.store(slot_mapping + begin + index, block * block_size + position % block_size, mask=inside)
    tl.store(seq_lens + seq, length)
    tl.store(query_start + seq + 1, end)
    if seq == 0:
        tl.store(query_start, 0)
        for offset in range(num_sampled, num_logits, BLOCK):  # rows of padding: any token will do
            index = offset + tl.arange(0, BLOCK)
            tl.store(logits_indices + index, tl.zeros([BLOCK], tl.int64), mask=index < num_logits)
    if place >= 0:
        for offset in range(0, num_drafts + 1, BLOCK):
            index = offset + tl.arange(0, BLOCK)
            inside = index <= num_drafts
            tl.store(logits_indices + place + index, (end - 1 - num_drafts + index).to(tl.int64), mask=inside)
            tl.store(sampled_slots + place + index, tl.zeros([BLOCK], tl.int64) + slot, mask=inside)


class DeviceSteps:
    """Keeps block tables and last tokens on the device, and makes the inputs of each step there.

    Attributes:
        last_token: [max_num_seqs] int64, the token sampled last in each slot.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int, device: torch.device) -> None:
        self._block_size = block_size
        self._tables = torch.zeros(max_num_seqs, -(-max_model_len // block_size), dtype=torch.int32, device=device)
        self._held = [0] * max_num_seqs
        self._device = device
        self._sampled_slots = torch.empty(0, dtype=torch.int64, device=device)
        self.last_token = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)

    def start(self, slot: int) -> None:
        """A sequence gets the slot: its block table begins empty."""
        self._held[slot] = 0

    def inputs(self, rows: Sequence[Row], sampled: Sequence[int], into: StepInputs | None = None) -> StepInputs:
        """The tensors of a step, with the rows' new blocks appended to their tables.

        Args:
            rows: those with a single token first.
            sampled: which of them, in the order in which their logits are wanted: of the last token of each, and of the
                `n_draft` before it.
            into: a graph's inputs, of as many sequences or more; filled, padded and returned. None makes new tensors.
        """
        counts = [row.n for row in rows]
        num_tokens = sum(counts)
        num_sampled = sum(rows[i].n_draft + 1 for i in sampled)
        packed = self._pack(rows, sampled)
        self._sampled_slots = torch.empty(num_sampled, dtype=torch.int64, device=self._device)
        inputs = into or self._new_inputs(rows, counts, num_sampled)
        padding = inputs.num_seqs - len(rows)
        _prepare_kernel[(inputs.num_seqs,)](
            packed,
            self._tables,
            self.last_token,
            self._sampled_slots,
            inputs.token_ids,
            inputs.positions,
            inputs.slot_mapping,
            inputs.query_start,
            inputs.seq_lens,
            inputs.block_table,
            inputs.logits_indices,
            len(rows),
            num_tokens,
            num_sampled,
            len(inputs.logits_indices),
            (len(inputs.token_ids) - num_tokens) // padding if padding else 0,
            self._block_size,
            M=self._tables.shape[1],
            BLOCK=_TOKENS,
        )
        return inputs

    def remember(self, token_ids: Tensor) -> None:
        """Take the tokens [R] int64 that were sampled from the step made last: what its slots go on with.

        Of a row with drafts any of them is kept: which one holds is for the host to find out, and to say in its next row.
        """
        self.last_token[self._sampled_slots] = token_ids

    def _pack(self, rows: Sequence[Row], sampled: Sequence[int]) -> Tensor:
        """Everything the kernel needs of the rows, on the device.

        slot [B] | start [B] | held blocks [B] | first place among sampled [B] | drafts [B] | query_start [B + 1]
        | new_block_start [B + 1] | token [T] | new block [N]
        """
        places = [_NOT_SAMPLED] * len(rows)
        place = 0
        for index in sampled:
            places[index] = place
            place += rows[index].n_draft + 1
        query_start, block_start, held = [0], [0], list[int]()
        tokens: list[int] = []
        blocks: list[int] = []
        for row in rows:
            assert isinstance(row.kv, PagedOps)
            tokens.extend((_ON_DEVICE,) if row.tokens is None else row.tokens)
            blocks.extend(row.kv.new_blocks)
            query_start.append(len(tokens))
            block_start.append(len(blocks))
            held.append(self._held[row.slot])
            self._held[row.slot] += len(row.kv.new_blocks)
        drafts = [row.n_draft for row in rows]
        by_row = ([row.slot for row in rows], [row.start for row in rows], held, places, drafts)
        values = [value for part in (*by_row, query_start, block_start, tokens, blocks) for value in part]
        packed = torch.tensor(values, dtype=torch.int32)
        if self._device.type != "cuda":
            return packed.to(self._device)
        # From pinned memory the transfer does not make the host wait; torch keeps the memory until it is done.
        return packed.pin_memory().to(self._device, non_blocking=True)

    def _new_inputs(self, rows: Sequence[Row], counts: Sequence[int], num_logits: int) -> StepInputs:
        lengths = [row.start + row.n for row in rows]
        query_start = [0]
        for count in counts:
            query_start.append(query_start[-1] + count)
        token_ids, positions, slot_mapping = torch.empty(3, query_start[-1], dtype=torch.int64, device=self._device)
        return StepInputs(
            token_ids=token_ids,
            positions=positions,
            slot_mapping=slot_mapping,
            query_start=torch.empty(len(rows) + 1, dtype=torch.int32, device=self._device),
            seq_lens=torch.empty(len(rows), dtype=torch.int32, device=self._device),
            block_table=torch.empty(len(rows), self._tables.shape[1], dtype=torch.int32, device=self._device),
            logits_indices=torch.empty(num_logits, dtype=torch.int64, device=self._device),
            num_decodes=sum(count == 1 for count in counts),
            max_query_len=max(counts),
            max_seq_len=max(lengths),
            host_query_start=query_start,
            host_seq_lens=lengths,
        )
