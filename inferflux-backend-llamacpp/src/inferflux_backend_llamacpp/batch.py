"""The batch of one `llama_decode`, in arrays that are written once a step and allocated once a model."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import llama_cpp
import numpy as np

from inferflux_core.engine.types import Row, SequenceOps


class Batch:
    """Fixed room for `capacity` tokens, each of exactly one sequence."""

    def __init__(self, capacity: int) -> None:
        self._tokens = np.zeros(capacity, dtype=np.int32)
        self._positions = np.zeros(capacity, dtype=np.int32)
        self._counts = np.ones(capacity, dtype=np.int32)
        self._streams = np.zeros(capacity, dtype=np.int32)
        # seq_id is an array of pointers to each token's list of sequences; ours all point into one array of single ids.
        addresses = self._streams.ctypes.data + np.arange(capacity, dtype=np.uint64) * np.uint64(4)
        self._stream_pointers = addresses.astype(np.uint64)
        self._outputs = np.zeros(capacity, dtype=np.int8)
        batch = llama_cpp.llama_batch()
        batch.embd = None
        batch.token = self._tokens.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token))
        batch.pos = self._positions.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_pos))
        batch.n_seq_id = self._counts.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        batch.seq_id = self._stream_pointers.ctypes.data_as(ctypes.POINTER(ctypes.POINTER(llama_cpp.llama_seq_id)))
        batch.logits = self._outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
        self.struct = batch

    def fill(self, rows: Sequence[Row]) -> dict[int, int]:
        """Write the rows in ascending order of their streams.

        Returns slot -> batch index of the first token whose logits are wanted, of the rows that sample: the last token of the
        row, or the one before its drafts; those after it follow.

        llama.cpp joins sequences in one pass over the weights only while their ids ascend by one in batch order.
        """
        end = 0
        outputs: dict[int, int] = {}
        for row in sorted(rows, key=_stream):
            assert row.tokens is not None
            begin, end = end, end + row.n
            self._tokens[begin:end] = row.tokens
            self._positions[begin:end] = range(row.start, row.start + row.n)
            self._streams[begin:end] = _stream(row)
            self._outputs[begin:end] = 0
            if row.sample:
                outputs[row.slot] = end - 1 - row.n_draft
                self._outputs[end - 1 - row.n_draft : end] = 1
        self.struct.n_tokens = end
        return outputs


def _stream(row: Row) -> int:
    assert isinstance(row.kv, SequenceOps)
    return row.kv.stream
