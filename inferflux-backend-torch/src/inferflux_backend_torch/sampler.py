"""The sampler on the device: draws a token for each row of logits of a step, with the meaning of core's reference sampler.

What depends on tokens drawn before (penalties) is kept on the device, so a step can be sampled while the tokens of the step
before it have not reached the host. The host knows everything else in advance (who is greedy, who has filters, bans or
logprobs), so each kind of extra work is done for the rows that asked for it, and a greedy batch costs one argmax.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from inferflux_backend_torch.device_draw import DeviceDraw
from inferflux_backend_torch.draw import Draw, is_greedy
from inferflux_backend_torch.host_draw import HostDraw, float_row, some_rows
from inferflux_backend_torch.logprobs import device_logprobs, host_logprobs
from inferflux_backend_torch.penalties import Penalties, upload
from inferflux_backend_torch.permitted import Words, without
from inferflux_core.engine.types import SamplingParams, SequenceInit, TokenLogprobs

_ANY: Mapping[int, Words] = MappingProxyType({})
_NONE: Mapping[int, int] = MappingProxyType({})


class Samples:
    """Tokens drawn in one step.

    Attributes:
        token_ids: [R] int64, on the device.
    """

    def __init__(self, token_ids: Tensor, counts: Sequence[int | None], logprobs: Tensor | None) -> None:
        """
        Args:
            counts: of each row, how many alternatives it wants; None for no logprobs.
            logprobs: of the rows with a count: logprob, alternatives' logprobs, alternatives' ids; [N, 1 + 2 M] int64 with
                floats as their bits, or None if there are no such rows.
        """
        self.token_ids = token_ids
        self._counts = counts
        packed = token_ids if logprobs is None else torch.cat((token_ids, logprobs.flatten()))
        self._event: torch.cuda.Event | None = None
        if packed.is_cuda:
            self._packed = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            self._packed.copy_(packed, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            self._event.record()
        else:
            self._packed = packed

    def collect(self) -> tuple[list[int], list[TokenLogprobs | None]]:
        """Tokens and logprobs of each row; waits for this step only, not for steps launched later."""
        if self._event is not None:
            self._event.synchronize()
        numbers = self._packed.cpu().numpy()
        rows = len(self._counts)
        entries: list[TokenLogprobs | None] = [None] * rows
        asking = [row for row, count in enumerate(self._counts) if count is not None]
        if asking:
            table = numbers[rows:].reshape(len(asking), -1)
            most = table.shape[1] // 2
            values = table[:, : 1 + most].astype(np.int32).view(np.float32)
            for row, value, ids in zip(asking, values.tolist(), table[:, 1 + most :].tolist(), strict=True):
                count = self._counts[row]
                entries[row] = TokenLogprobs(value[0], list(zip(ids[:count], value[1:], strict=False)))
        return numbers[:rows].tolist(), entries


class DeviceSampler:
    """Draws tokens for the sequences of one engine, by slot."""

    def __init__(
        self, vocab_size: int, eos_token_ids: frozenset[int], max_num_seqs: int, device: torch.device, draw: Draw | None = None
    ) -> None:
        """
        Args:
            draw: how to choose tokens with torch or kernels of the device. None is plain torch, but for the CPU numpy, which
                then computes penalties and logprobs too.
        """
        self._vocab_size = vocab_size
        self._device = device
        self._on_host = on_host = draw is None and device.type == "cpu"
        self._scratch = torch.empty(0, vocab_size)
        if draw is None:
            draw = HostDraw(vocab_size) if on_host else DeviceDraw(vocab_size, max_num_seqs, device)
        self._draw = draw
        self._penalties = Penalties(vocab_size, eos_token_ids, device, on_host)
        self._logprobs_of = host_logprobs if on_host else device_logprobs
        self._params: dict[int, SamplingParams] = {}
        self._plain: set[int] = set()

    def start(self, init: SequenceInit) -> None:
        """A sequence gets a slot, new or resumed."""
        slot, params = init.slot, init.params
        self._params[slot] = params
        self._penalties.start(init)
        self._draw.start(slot, params)
        untouched = not (params.ignore_eos or params.min_tokens or self._penalties.changes(slot))
        if is_greedy(params) and untouched and params.logprobs is None:
            self._plain.add(slot)
        else:
            self._plain.discard(slot)

    def free(self, slot: int) -> None:
        """The slot's sequence is gone."""
        self._penalties.free(slot)
        self._params.pop(slot, None)
        self._plain.discard(slot)

    @torch.inference_mode()
    def sample(
        self,
        logits: Tensor,
        slots: Sequence[int],
        positions: Sequence[int],
        permitted: Mapping[int, Words] = _ANY,
        drafts: Mapping[int, int] = _NONE,
    ) -> Samples:
        """Draw one token for each row; waits for nothing on the device.

        Args:
            logits: [R, V] of any floating type, no row sharing memory with another; unchanged on return, though banned tokens
                are overwritten meanwhile.
            slots: [R], whose parameters and history to use. A slot may have several rows, to verify drafts, unless it has
                penalties: these depend on the tokens drawn before.
            positions: [R], index of the new token in its sequence; part of the noise's key.
            permitted: by row, the tokens that may be drawn, if these are not all. Bans that would leave none do not count.
            drafts: by row, the token that the row after it goes on from. Where another one is drawn, the rows behind it are of
                no use, and may be left out.
        """
        if not permitted and self._plain.issuperset(slots):
            return Samples(self._draw.argmax(logits), [None] * len(slots), None)
        if drafts and self._on_host and any(self._takes_long(slots[row]) for row in drafts):
            tokens, drawn = self._along_drafts(logits, slots, positions, permitted, drafts)
        else:
            tokens, drawn = self._tokens(logits, slots, positions, permitted), list(range(len(slots)))
        counting = [row for row, slot in enumerate(slots) if self._penalties.counts(slot)]
        if counting:
            self._penalties.count([slots[row] for row in counting], tokens[self._index(counting)])
        counts: list[int | None] = [None] * len(slots)
        for row in drawn:
            counts[row] = self._params[slots[row]].logprobs
        return Samples(tokens, counts, self._logprobs(logits, tokens, counts))

    def _takes_long(self, slot: int) -> bool:
        """Whether a draw of the slot reads its row more than once: what a rejected draft is to be spared."""
        params = self._params[slot]
        return params.logprobs is not None or not is_greedy(params)

    def _along_drafts(
        self,
        logits: Tensor,
        slots: Sequence[int],
        positions: Sequence[int],
        permitted: Mapping[int, Words],
        drafts: Mapping[int, int],
    ) -> tuple[Tensor, list[int]]:
        """Tokens of the rows that are of use, round by round: the first of each slot, then those whose draft was drawn.

        A draw takes half a millisecond with a vocabulary of 49152, so that those behind a rejected draft would cost more than
        the draft may bring. This way a token costs the same with and without drafts.

        Returns:
            [R] int64, and the rows that were drawn; the others have -1.
        """
        tokens = torch.full((len(slots),), -1, dtype=torch.int64)
        drawn: list[int] = []
        rows = [row for row in range(len(slots)) if row - 1 not in drafts]
        while rows:
            words = {i: permitted[row] for i, row in enumerate(rows) if row in permitted}
            some = self._tokens(some_rows(logits, rows), [slots[row] for row in rows], [positions[row] for row in rows], words)
            tokens[self._index(rows)] = some
            drawn += rows
            rows = [row + 1 for row, token in zip(rows, some.tolist(), strict=True) if drafts.get(row) == token]
        return tokens, drawn

    def _tokens(self, logits: Tensor, slots: Sequence[int], positions: Sequence[int], permitted: Mapping[int, Words]) -> Tensor:
        changed: list[int] = []
        banned: list[tuple[int, int]] = []
        banned_of_changed: list[tuple[int, int]] = []
        words: dict[int, Words] = {}
        for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
            ban = self._penalties.banned(slot, position)
            if row in permitted:
                words[row] = without(permitted[row], ban)
                ban = ()
            if self._penalties.changes(slot):
                banned_of_changed += [(len(changed), token) for token in ban]
                changed.append(row)
            else:
                banned += [(row, token) for token in ban]
        if len(changed) < len(slots):
            with self._without(logits, banned):
                tokens = self._choose(logits, slots, positions, words, frozenset(changed))
        else:
            tokens = torch.empty(len(slots), dtype=torch.int64, device=self._device)
        if changed:
            index = self._index(changed)
            some_slots, some_positions = [slots[row] for row in changed], [positions[row] for row in changed]
            some = self._copy(logits, index)
            self._penalties.apply(some, some_slots)
            some_words = {i: words[row] for i, row in enumerate(changed) if row in words}
            with self._without(some, banned_of_changed):
                tokens[index] = self._choose(some, some_slots, some_positions, some_words)
        return tokens

    def _choose(
        self,
        logits: Tensor,
        slots: Sequence[int],
        positions: Sequence[int],
        words: Mapping[int, Words],
        skip: frozenset[int] = frozenset(),
    ) -> Tensor:
        """A token for each row; those to skip get any."""
        drawn: list[int] = []
        masked: list[int] = []
        greedy = False
        for row, slot in enumerate(slots):
            if row in skip:
                continue
            if row in words:
                masked.append(row)
            elif is_greedy(self._params[slot]):
                greedy = True
            else:
                drawn.append(row)
        if len(drawn) == len(slots):
            return self._draw.draw(logits, drawn, slots, positions)
        tokens = self._draw.argmax(logits) if greedy else torch.empty(len(slots), dtype=torch.int64, device=self._device)
        if drawn:
            some = [slots[row] for row in drawn], [positions[row] for row in drawn]
            tokens[self._index(drawn)] = self._draw.draw(logits, drawn, *some)
        if masked:
            some = [slots[row] for row in masked], [positions[row] for row in masked]
            tokens[self._index(masked)] = self._draw.draw_permitted(logits, masked, *some, [words[row] for row in masked])
        return tokens

    @contextmanager
    def _without(self, logits: Tensor, banned: list[tuple[int, int]]) -> Iterator[None]:
        """Within, the (row, token) entries are impossible. Overwriting a few entries spares a copy of the logits."""
        if not banned:
            yield
            return
        rows, columns = self._index(banned).unbind(dim=1)
        saved = logits[rows, columns]
        logits[rows, columns] = -torch.inf
        yield
        logits[rows, columns] = saved

    def _logprobs(self, logits: Tensor, tokens: Tensor, counts: Sequence[int | None]) -> Tensor | None:
        asking = [row for row, count in enumerate(counts) if count is not None]
        if not asking:
            return None
        index = self._index(asking)
        most = min(max(count for count in counts if count is not None), self._vocab_size)
        values, ids = self._logprobs_of(logits, index, tokens[index], most)
        return torch.cat((values.view(torch.int32).to(torch.int64), ids), dim=1)

    def _copy(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Rows [N] of logits in float32, to be changed."""
        if not self._on_host:
            return logits[rows].float()
        if len(self._scratch) < len(rows):  # kept: on the host, pages of fresh memory cost more than the copy
            self._scratch = torch.empty(2 * len(rows), self._vocab_size)
        for to, row in zip(self._scratch.numpy(), rows.tolist(), strict=False):
            to[:] = float_row(logits, row)
        return self._scratch[: len(rows)]

    def _index(self, values: object) -> Tensor:
        return upload(self._device, values, torch.int64)
