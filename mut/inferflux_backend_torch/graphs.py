"""Decode steps as recorded graphs: one launch replays a whole forward pass, which takes Python out of it.

A graph repeats the same kernels on the same memory, so a step is padded to one of a few sizes and its inputs go into tensors
that stay. Rows of padding read and write the null block 0. A graph also serves one longest context only, as attention splits
contexts by it: short ones would pay for the split of the longest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from inferflux_backend_torch.inputs import StepInputs

Forward = Callable[[StepInputs], Tensor]

# How many sizes are recorded at the start; the others when a step first needs them.
_RECORDED_AT_START = 8
_CONTEXTS = (4096, 32768)


class Recorder(Protocol):
    """Turns calls into something that can be repeated cheaply, on the same tensors."""

    def __call__(self, run: Callable[[], object]) -> Callable[[], object]:
        """Run once or more, and return what repeats it."""


class CudaRecorder:
    """CUDA graphs that share one memory pool: recorded largest first, the smaller ones fit into what the largest took."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], object]) -> Callable[[], object]:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels are compiled and libraries set up outside the recording
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            run()
        return graph.replay


class NoRecorder:
    """Repeats by calling again: for devices without graphs, and for tests."""

    def __call__(self, run: Callable[[], object]) -> Callable[[], object]:
        run()
        return run


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Numbers of sequences that get a graph, ascending: the finer, the smaller, and max_num_seqs itself up to 512."""
    most = min(max_num_seqs, 512)
    sizes = {1, 2, 4, *range(8, 257, 8), *range(320, 513, 64), most}
    return sorted(size for size in sizes if size <= most)


class DecodeGraphs:
    """Runs steps in which every sequence has the same small number of tokens.

    Args:
        forward: one step, from inputs to one row for each of `logits_indices`. It must not look at the host's lists of the
            inputs but for their lengths, wait for the device, or keep what it returned.
        max_model_len: longest context of a step.
        block_size: of the cache, at least query_len.
        query_len: tokens of each sequence; 1, or k + 1 with k draft tokens.
        recorder: CUDA graphs, unless a test wants otherwise.
    """

    def __init__(
        self,
        forward: Forward,
        *,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        device: torch.device,
        query_len: int = 1,
        recorder: Recorder | None = None,
    ) -> None:
        self.sizes = graph_sizes(max_num_seqs)
        self.contexts = [*(context for context in _CONTEXTS if context < max_model_len), max_model_len]
        self._forward = forward
        self._query_len = query_len
        self._recorder = recorder or CudaRecorder()
        self._replays: dict[tuple[int, int], Callable[[], object]] = {}
        self._inputs: dict[tuple[int, int], StepInputs] = {}
        self._outputs: Tensor | None = None
        tokens, seqs = self.sizes[-1] * query_len, self.sizes[-1]
        index = torch.arange(tokens, device=device)
        offsets = index % query_len
        self._padding = StepInputs(
            token_ids=torch.zeros_like(index),
            positions=offsets,
            slot_mapping=offsets,
            query_start=torch.arange(seqs + 1, dtype=torch.int32, device=device) * query_len,
            seq_lens=torch.full((seqs,), query_len, dtype=torch.int32, device=device),
            block_table=torch.zeros(seqs, -(-max_model_len // block_size), dtype=torch.int32, device=device),
            logits_indices=index,
            num_decodes=0,
            max_query_len=query_len,
            max_seq_len=max_model_len,
            host_query_start=list(range(0, tokens + 1, query_len)),
            host_seq_lens=[query_len] * seqs,
        )
        self._static = _part(self._padding, seqs, query_len, clone=True)

    def warm_up(self) -> None:
        """Record the largest graph and the smallest few, for the shortest contexts."""
        first = {self.sizes[-1], *self.sizes[: _RECORDED_AT_START - 1]}
        for size in sorted(first, reverse=True):
            self._replay(size, self.contexts[0])

    def inputs_for(self, num_seqs: int, max_seq_len: int) -> StepInputs | None:
        """Tensors to fill for a step of so many sequences with `query_len` tokens each, padded to a graph's size.

        None where no graph is large enough; steps of other query lengths are the caller's to keep away.
        """
        size = next((size for size in self.sizes if size >= num_seqs), None)
        context = next((context for context in self.contexts if context >= max_seq_len), None)
        return None if size is None or context is None else self._static_inputs(size, context)

    def run(self, inputs: StepInputs) -> Tensor:
        """Forward pass by the graph that fits, or without one.

        Args:
            inputs: those of `inputs_for`, filled, which costs no copy; or any others.

        Returns:
            As `forward`: a row for each of `logits_indices`; valid until the next run.
        """
        key = (inputs.num_seqs, inputs.max_seq_len)
        if self._inputs.get(key) is inputs:
            self._replay(*key)
            return self._rows(len(inputs.logits_indices))
        static = self._fitting(inputs)
        if static is None:
            return self._forward(inputs)
        self._copy(inputs, static)
        self._replay(static.num_seqs, static.max_seq_len)
        return self._rows(len(inputs.logits_indices))

    def _fitting(self, inputs: StepInputs) -> StepInputs | None:
        same = len(inputs.token_ids) == inputs.num_seqs * self._query_len and inputs.max_query_len == self._query_len
        if not same or len(inputs.logits_indices) > len(inputs.token_ids):
            return None
        return self.inputs_for(inputs.num_seqs, inputs.max_seq_len)

    def _static_inputs(self, size: int, context: int) -> StepInputs:
        key = (size, context)
        if key not in self._inputs:
            inputs = _part(self._static, size, self._query_len)
            inputs.max_seq_len = context
            self._inputs[key] = inputs
        return self._inputs[key]

    def _copy(self, inputs: StepInputs, static: StepInputs) -> None:
        """The step in front, padding behind it."""
        for name in ("token_ids", "positions", "slot_mapping", "query_start", "seq_lens", "block_table", "logits_indices"):
            source, target, padding = (getattr(each, name) for each in (inputs, static, self._padding))
            rows = len(source)
            if name == "block_table":
                width = min(source.shape[1], target.shape[1])
                target[:rows, width:] = 0
                target[:rows, :width] = source[:, :width]
            else:
                target[:rows] = source
            target[rows:] = padding[rows : len(target)]

    def _replay(self, size: int, context: int) -> None:
        key = (size, context)
        if key not in self._replays:
            inputs = self._static_inputs(size, context)
            self._replays[key] = self._recorder(lambda: self._store(self._forward(inputs)))
        self._replays[key]()

    def _store(self, output: Tensor) -> None:
        """Copied out, so that graphs can share the memory of everything that they compute."""
        if self._outputs is None or len(self._outputs) < len(output):
            rows = max(len(output), len(self._static.token_ids))
            self._outputs = output.new_empty(rows, *output.shape[1:])
        self._outputs[: len(output)].copy_(output)

    def _rows(self, count: int) -> Tensor:
        assert self._outputs is not None
        return self._outputs[:count]


def _part(inputs: StepInputs, seqs: int, query_len: int, clone: bool = False) -> StepInputs:
    """The first sequences of it, in the same memory or in a copy."""

    def first(tensor: Tensor, count: int) -> Tensor:
        return tensor[:count].clone() if clone else tensor[:count]

    tokens = seqs * query_len
    return StepInputs(
        token_ids=first(inputs.token_ids, tokens),
        positions=first(inputs.positions, tokens),
        slot_mapping=first(inputs.slot_mapping, tokens),
        query_start=first(inputs.query_start, seqs + 1),
        seq_lens=first(inputs.seq_lens, seqs),
        block_table=first(inputs.block_table, seqs),
        logits_indices=first(inputs.logits_indices, tokens),
        num_decodes=seqs if query_len == 1 else 0,
        max_query_len=query_len,
        max_seq_len=inputs.max_seq_len,
        host_query_start=inputs.host_query_start[: seqs + 1],
        host_seq_lens=inputs.host_seq_lens[:seqs],
    )
