"""Bans, logit_bias and penalties: what changes logits before a token is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from inferflux_core.engine.types import SamplingParams, SequenceInit

# A count's lower bits are occurrences in the output; this one says that the token occurs in the prompt.
_IN_PROMPT = 1 << 30


def upload(device: torch.device, values: object, dtype: torch.dtype) -> Tensor:
    """Numbers of the host as a tensor on the device, without waiting for the work queued there."""
    tensor = torch.as_tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@dataclass(slots=True)
class _Sequence:
    params: SamplingParams
    num_prompt: int
    stop_ids: tuple[int, ...]
    bias: tuple[Tensor, Tensor] | None  # token ids and addends, on the device
    counts: int | None  # row of the table of counts; None without penalties


class Penalties:
    """The sequences' bans, biases and penalties, by slot.

    How often each token occurred is counted on the device, where a token may still be when the next one is drawn; only
    requests with penalties have a row of counts. The length of the output needs no counter: it follows from the position.
    """

    def __init__(self, vocab_size: int, eos_token_ids: Iterable[int], device: torch.device, on_host: bool) -> None:
        """
        Args:
            on_host: penalise with numpy, token by token that occurred; else with torch, without waiting for the device.
        """
        self._vocab_size = vocab_size
        self._penalise = _penalise_on_host if on_host else _penalise
        self._eos = self._known(eos_token_ids)
        self._device = device
        self._sequences: dict[int, _Sequence] = {}
        self._counts = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self._unused: list[int] = []

    def _known(self, token_ids: Iterable[int]) -> tuple[int, ...]:
        """Without ids beyond the vocabulary: they are never drawn anyway, and as an index they would stop a GPU."""
        return tuple(sorted(i for i in set(token_ids) if 0 <= i < self._vocab_size))

    def start(self, init: SequenceInit) -> None:
        """A sequence gets a slot, new or resumed."""
        params = init.params
        self.free(init.slot)
        bias = None
        if ids := self._known(params.logit_bias):
            values = [params.logit_bias[i] for i in ids]
            bias = (upload(self._device, ids, torch.int64), upload(self._device, values, torch.float32))
        counts = None
        if params.is_penalised:
            counts = self._count_history(init)
        self._sequences[init.slot] = _Sequence(params, init.num_prompt_tokens, self._known(params.stop_token_ids), bias, counts)

    def free(self, slot: int) -> None:
        """The slot's sequence is gone."""
        sequence = self._sequences.pop(slot, None)
        if sequence is not None and sequence.counts is not None:
            self._unused.append(sequence.counts)

    def _count_history(self, init: SequenceInit) -> int:
        """A row of counts that begins with the sequence's tokens."""
        tokens = np.asarray(init.tokens, dtype=np.int64)
        history = np.bincount(tokens[init.num_prompt_tokens :], minlength=self._vocab_size)
        if init.params.repetition_penalty != 1.0:  # the other penalties are for output only
            history[np.unique(tokens[: init.num_prompt_tokens])] |= _IN_PROMPT
        if not self._unused:
            size = len(self._counts)
            grown = self._counts.new_zeros(max(4, 2 * size), self._vocab_size)
            grown[:size] = self._counts
            self._counts = grown
            self._unused = list(range(len(grown) - 1, size - 1, -1))
        row = self._unused.pop()
        self._counts[row] = upload(self._device, history, torch.int32)
        return row

    def changes(self, slot: int) -> bool:
        """Whether `apply` does anything."""
        sequence = self._sequences[slot]
        return sequence.bias is not None or sequence.counts is not None

    def counts(self, slot: int) -> bool:
        """Whether `count` wants the slot's tokens."""
        return self._sequences[slot].counts is not None

    def banned(self, slot: int, position: int) -> tuple[int, ...]:
        """Tokens that may not be drawn at this position."""
        sequence = self._sequences[slot]
        too_short = position - sequence.num_prompt < sequence.params.min_tokens
        if not (too_short or sequence.params.ignore_eos):
            return ()
        return self._eos + sequence.stop_ids if too_short else self._eos

    def apply(self, logits: Tensor, slots: Sequence[int]) -> None:
        """Change logits [N, V], float32, of these slots in place: bias, then penalties. Bans may come before or after."""
        sequences = [self._sequences[slot] for slot in slots]
        for row, sequence in enumerate(sequences):
            if sequence.bias is not None:
                logits[row].index_add_(0, *sequence.bias)
        penalised = [(row, sequence) for row, sequence in enumerate(sequences) if sequence.counts is not None]
        if penalised:
            params = [sequence.params for _, sequence in penalised]
            rows = upload(self._device, [row for row, _ in penalised], torch.int64)
            table_rows = upload(self._device, [sequence.counts for _, sequence in penalised], torch.int64)
            self._penalise(logits, rows, self._counts, table_rows, params)

    def count(self, slots: Sequence[int], tokens: Tensor) -> None:
        """Tokens [N] were drawn for these slots, all of which have penalties."""
        rows = upload(self._device, [self._sequences[slot].counts for slot in slots], torch.int64)
        self._counts.view(-1).index_add_(0, rows * self._vocab_size + tokens, torch.ones_like(tokens, dtype=torch.int32))


def _penalise(logits: Tensor, rows: Tensor, table: Tensor, table_rows: Tensor, params: Sequence[SamplingParams]) -> None:
    """Change some rows [N] of logits [R, V] in place, by rows [N] of the table of counts; params are theirs."""
    counts = table[table_rows]
    values = logits[rows]
    rates = [[p.repetition_penalty, p.frequency_penalty, p.presence_penalty] for p in params]
    repetition, frequency, presence = upload(logits.device, rates, torch.float32).T.unsqueeze(2)
    if any(p.repetition_penalty != 1.0 for p in params):
        penalised = torch.where(values > 0, values / repetition, values * repetition)
        values = torch.where(counts > 0, penalised, values)
    if any(p.frequency_penalty != 0.0 or p.presence_penalty != 0.0 for p in params):
        occurrences = counts & (_IN_PROMPT - 1)
        values = values - torch.where(occurrences > 0, frequency * occurrences + presence, 0.0)
    logits[rows] = values


def _penalise_on_host(
    logits: Tensor, rows: Tensor, table: Tensor, table_rows: Tensor, params: Sequence[SamplingParams]
) -> None:
    """The same, looking only at tokens that occurred."""
    for row, table_row, p in zip(rows.tolist(), table_rows.tolist(), params, strict=True):
        logits_row, counts = logits[row].numpy(), table[table_row].numpy()
        seen = np.flatnonzero(counts != 0)  # on integers itself it is four times slower
        values = logits_row[seen]
        if p.repetition_penalty != 1.0:
            repetition = np.float32(p.repetition_penalty)
            values = np.where(values > 0, values / repetition, values * repetition)
        occurrences = counts[seen] & (_IN_PROMPT - 1)
        rates = np.float32(p.frequency_penalty) * occurrences.astype(np.float32) + np.float32(p.presence_penalty)
        logits_row[seen] = values - np.where(occurrences > 0, rates, np.float32(0))
