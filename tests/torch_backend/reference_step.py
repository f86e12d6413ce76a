"""Drives a Decoder by hand: sequences in scattered blocks of a cache, and steps of any mix of them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from inferflux_backend_torch.checkpoint import Checkpoint, read_json
from inferflux_backend_torch.config import DecoderConfig
from inferflux_backend_torch.families import decoder_config
from inferflux_backend_torch.inputs import KVCache, StepInputs
from inferflux_backend_torch.linear import LinearFactory, PlainLinear
from inferflux_backend_torch.loader import load_decoder
from inferflux_backend_torch.model import Comm, Decoder
from inferflux_backend_torch.ops import TorchOps
from inferflux_backend_torch.shard import Shard
from inferflux_core.interfaces import SourceContext
from inferflux_core.models.sources import PathSource


def open_checkpoint(folder: Path) -> Checkpoint:
    return Checkpoint.open(PathSource().resolve(str(folder), SourceContext()))


def read_config(folder: Path) -> DecoderConfig:
    config = decoder_config(read_json(folder / "config.json", "model configuration"))
    assert config is not None
    return config


def load(
    folder: Path,
    *,
    max_model_len: int = 256,
    linear: LinearFactory = PlainLinear,
    shard: Shard | None = None,
    comm: Comm | None = None,
    dtype: torch.dtype = torch.float32,
) -> Decoder:
    """The model in a folder, on the CPU."""
    return load_decoder(
        read_config(folder),
        open_checkpoint(folder),
        dtype=dtype,
        device=torch.device("cpu"),
        linear=linear,
        ops=TorchOps(),
        max_model_len=max_model_len,
        shard=shard or Shard(),
        comm=comm,
    )


class ReferenceRunner:
    """A decoder with a cache of its own. Sequences go by any key; their blocks come in a shuffled order, block 0 never."""

    def __init__(self, decoder: Decoder, *, block_size: int = 4, num_blocks: int = 400) -> None:
        first = decoder.layers[0]
        self._decoder = decoder
        self._cache = KVCache(
            len(decoder.layers),
            num_blocks,
            block_size,
            first.num_kv_heads,
            first.head_dim,
            decoder.dtype,
            decoder.device,
        )
        self._cache.data.fill_(torch.nan)  # what is read without having been written shows
        self._free = list(range(1, num_blocks))
        random.Random(5).shuffle(self._free)
        self._blocks: dict[str, list[int]] = {}
        self._lengths: dict[str, int] = {}

    def step(self, work: Mapping[str, Sequence[int]], *, all_tokens: bool = False) -> dict[str, Tensor]:
        """Run the next tokens of some sequences together.

        Returns:
            by sequence, logits of its last token [V], or of all tokens of this step [n, V].
        """
        order = sorted(work, key=lambda name: len(work[name]))
        inputs = self._inputs({name: work[name] for name in order})
        if all_tokens:
            inputs.logits_indices = torch.arange(len(inputs.token_ids))
        with torch.inference_mode():
            logits = self._decoder.logits(self._decoder.forward(inputs, self._cache))
        if not all_tokens:
            return dict(zip(order, logits, strict=True))
        return dict(zip(order, torch.split(logits, [len(work[name]) for name in order]), strict=True))

    def fill(self, work: Mapping[str, Sequence[int]]) -> Tensor:
        """Run tokens that no logits are wanted of.

        Returns:
            the hidden states of none of them.
        """
        inputs = self._inputs(work)
        inputs.logits_indices = inputs.logits_indices[:0]
        with torch.inference_mode():
            return self._decoder.forward(inputs, self._cache)

    def generate(self, prompts: Mapping[str, Sequence[int]], count: int) -> dict[str, list[int]]:
        """Greedy continuations, all sequences batched, after one step for the prompts."""
        outputs: dict[str, list[int]] = {name: [] for name in prompts}
        work = {name: list(prompt) for name, prompt in prompts.items()}
        for _ in range(count):
            for name, logits in self.step(work).items():
                outputs[name].append(int(logits.argmax()))
            work = {name: tokens[-1:] for name, tokens in outputs.items()}
        return outputs

    def _inputs(self, work: Mapping[str, Sequence[int]]) -> StepInputs:
        """Of a step that wants the logits of each sequence's last token."""
        size = self._cache.block_size
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts = [0]
        for name, new in work.items():
            before = self._lengths.get(name, 0)
            blocks = self._blocks.setdefault(name, [])
            self._lengths[name] = before + len(new)
            while len(blocks) * size < self._lengths[name]:
                blocks.append(self._free.pop())
            tokens += new
            positions += range(before, before + len(new))
            slots += [blocks[p // size] * size + p % size for p in range(before, before + len(new))]
            starts.append(len(tokens))
        lengths = [self._lengths[name] for name in work]
        width = max(len(self._blocks[name]) for name in work)
        table = torch.zeros((len(work), width), dtype=torch.int32)
        for row, name in zip(table, work, strict=True):
            row[: len(self._blocks[name])] = torch.tensor(self._blocks[name])
        last = [end - 1 for end in starts[1:]]
        return StepInputs(
            token_ids=torch.tensor(tokens),
            positions=torch.tensor(positions),
            slot_mapping=torch.tensor(slots),
            query_start=torch.tensor(starts, dtype=torch.int32),
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            block_table=table,
            logits_indices=torch.tensor(last),
            num_decodes=sum(len(new) == 1 for new in work.values()),
            max_query_len=max(map(len, work.values())),
            max_seq_len=max(lengths),
            host_query_start=starts,
            host_seq_lens=lengths,
        )
