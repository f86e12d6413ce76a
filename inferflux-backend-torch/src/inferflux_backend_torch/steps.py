"""From the rows of a plan to the tensors of a step, on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from inferflux_backend_torch.inputs import StepInputs
from inferflux_core.engine.types import PagedOps, Row


class Steps(Protocol):
    """Keeps the block tables, and makes the inputs of each step."""

    def start(self, slot: int) -> None:
        """A sequence gets the slot: its block table begins empty."""

    def inputs(self, rows: Sequence[Row], sampled: Sequence[int]) -> StepInputs:
        """The tensors of a step, with the rows' new blocks appended to their tables.

        Args:
            rows: those with a single token first.
            sampled: which of them, in the order in which their logits are wanted: of the last token of each, and of the
                `n_draft` before it.
        """


class HostSteps:
    """With numpy on the host. A sequence's blocks never reach the device but with a step."""

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int, device: torch.device) -> None:
        self._block_size = block_size
        self._tables = np.zeros((max_num_seqs, -(-max_model_len // block_size)), dtype=np.int32)
        self._num_blocks = [0] * max_num_seqs
        self._device = device

    def start(self, slot: int) -> None:
        self._num_blocks[slot] = 0

    def inputs(self, rows: Sequence[Row], sampled: Sequence[int]) -> StepInputs:
        for row in rows:
            assert isinstance(row.kv, PagedOps)
            if row.kv.new_blocks:
                held = self._num_blocks[row.slot]
                self._num_blocks[row.slot] = end = held + len(row.kv.new_blocks)
                self._tables[row.slot, held:end] = row.kv.new_blocks
        size = self._block_size
        counts = np.array([row.n for row in rows], dtype=np.int64)
        starts = np.array([row.start for row in rows], dtype=np.int64)
        slots = np.array([row.slot for row in rows], dtype=np.int64)
        lengths = starts + counts
        query_start = np.concatenate(((0,), np.cumsum(counts)))
        ends = query_start.tolist()
        token_ids = np.empty(ends[-1], dtype=np.int64)
        for row, first in zip(rows, ends, strict=False):
            assert row.tokens is not None, "only a device that is one step ahead is given tokens it has not reported"
            token_ids[first : first + row.n] = row.tokens
        positions = np.arange(len(token_ids)) + np.repeat(starts - query_start[:-1], counts)
        blocks = self._tables[np.repeat(slots, counts), positions // size].astype(np.int64)
        width = -(-int(lengths.max()) // size)
        wanted = [token for i in sampled for token in range(ends[i + 1] - 1 - rows[i].n_draft, ends[i + 1])]
        return StepInputs(
            token_ids=self._tensor(token_ids),
            positions=self._tensor(positions),
            slot_mapping=self._tensor(blocks * size + positions % size),
            query_start=self._tensor(query_start.astype(np.int32)),
            seq_lens=self._tensor(lengths.astype(np.int32)),
            block_table=self._tensor(self._tables[slots, :width]),
            logits_indices=self._tensor(np.array(wanted, dtype=np.int64)),
            num_decodes=int((counts == 1).sum()),
            max_query_len=int(counts.max()),
            max_seq_len=int(lengths.max()),
            host_query_start=ends,
            host_seq_lens=lengths.tolist(),
        )

    def _tensor(
        self, array: np.ndarray[tuple[int, ...], np.dtype[np.int64]] | np.ndarray[tuple[int, ...], np.dtype[np.int32]]
    ) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)
