"""Drawing tokens on the CPU, row by row with numpy: for the tokens that can win only, and bit for bit as the reference does.

A call of numpy costs a third of a microsecond, a tenth of torch's, and its argmax reads a row ten times as fast. What costs is
the noise: 0.3 ms for a vocabulary of 49152, 0.1 ms with the kernels in C. So filters look at the likely tokens first, and
without filters the best of the likely tokens bounds who else can win, since noise is bounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from inferflux_backend_torch.draw import is_greedy
from inferflux_backend_torch.native_kernels import BUILT, kernels
from inferflux_backend_torch.permitted import Words, all_tokens, few_ids, has
from inferflux_backend_torch.philox import MOST_NOISE, Words64, noise_of_groups, noise_of_tokens, round_keys
from inferflux_core.engine.types import SamplingParams

Row = npt.NDArray[np.float32]
TokenIds = npt.NDArray[np.int64]

_MASK64 = (1 << 64) - 1
_INFINITY = np.float32(np.inf)

# Likely tokens have at least e**-8 of the probability of the most likely one: in language models a few dozen tokens.
_LIKELY = 8.0
# Noise for more candidates than this is computed row by row, where the keys are scalars and neighbours share their words.
_FEW = 1024
# Scores that matter are below 64 in magnitude: the slack covers their rounding a thousand times.
_MOST_NOISE = np.float32(MOST_NOISE + 0.01)
# A row where half of the vocabulary is nearer than this needs nearly all of the noise; looking for less would be in vain.
_NEAR = np.float32(2.0 - MOST_NOISE)


@dataclass(slots=True, frozen=True)
class _Contest:
    """One draw: some tokens in ascending order and their scaled logits.

    Attributes:
        everyone: without filters, the scaled logits of the whole vocabulary, which the tokens are only the most likely of.
    """

    slot: int
    position: int
    ids: TokenIds
    scaled: Row
    everyone: Row | None = None


class HostDraw:
    """Draws for the slots of one engine."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._ids = np.arange(vocab_size)
        self._groups = np.arange(-(-vocab_size // 4), dtype=np.uint64)
        self._params: dict[int, SamplingParams] = {}
        self._keys: dict[int, Words64] = {}

    def start(self, slot: int, params: SamplingParams) -> None:
        self._params[slot] = params
        self._keys[slot] = round_keys(params.seed)

    def argmax(self, logits: Tensor) -> Tensor:
        """Most likely token of each row of [R, V], the lowest id of equals: [R] int64. Broken rows as in the reference."""
        if logits.dtype in (torch.bfloat16, torch.float16):
            # Positive floats are ordered like their bits, and numpy compares integers of 16 bits as fast as memory gives them.
            bits = logits.view(torch.int16).numpy()
            tokens = bits.argmax(axis=-1)
            best = np.take_along_axis(bits, tokens[:, np.newaxis], axis=-1)[:, 0]
            infinity = 0x7F80 if logits.dtype is torch.bfloat16 else 0x7C00
            plain = (best > 0) & (best <= infinity)  # else nothing is positive, or something is NaN
        else:
            rows = logits.float().numpy()
            tokens = rows.argmax(axis=-1)
            plain = np.isfinite(np.take_along_axis(rows, tokens[:, np.newaxis], axis=-1)[:, 0])
        for i in np.flatnonzero(~plain).tolist():
            tokens[i] = possible(float_row(logits, i))[0].argmax()
        return torch.from_numpy(tokens)

    def draw(self, logits: Tensor, rows: Sequence[int], slots: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Draw a token for some rows of logits [R, V].

        Args:
            rows: indices into logits, [N]; slots and positions are parallel to it.

        Returns:
            [N] int64.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            return self._settle(
                self._contest(slot, position, *possible(float_row(logits, row)))
                for row, slot, position in zip(rows, slots, positions, strict=True)
            )

    def draw_permitted(
        self, logits: Tensor, rows: Sequence[int], slots: Sequence[int], positions: Sequence[int], words: Sequence[Words]
    ) -> Tensor:
        """As `draw`, but only tokens permitted by the row's words, and the most likely of them for greedy slots."""
        with np.errstate(over="ignore", invalid="ignore"):
            return self._settle(
                self._permitted(logits, row, slot, position, permitted)
                for row, slot, position, permitted in zip(rows, slots, positions, words, strict=True)
            )

    def _permitted(self, logits: Tensor, row: int, slot: int, position: int, words: Words) -> _Contest | int:
        """The contest of the tokens that are permitted, or who wins it where that takes no noise."""
        greedy = is_greedy(self._params[slot])
        ids = few_ids(words)
        if ids is not None:
            if len(ids) == 1:
                return int(ids[0])
            values, highest = possible(_some(logits, row, ids))
            return int(ids[values.argmax()]) if greedy else self._contest(slot, position, values, highest, ids)
        if greedy:
            token = int(self.argmax(logits[row : row + 1])[0])
            if has(words, token):
                return token
        permitted = all_tokens(words, self._vocab_size)
        values, highest = possible(np.where(permitted, float_row(logits, row), -_INFINITY), permitted)
        return int(values.argmax()) if greedy else self._contest(slot, position, values, highest)

    def _settle(self, contests: Iterable[_Contest | int]) -> Tensor:
        """Who wins: [N] int64."""
        tokens: list[int] = []
        few: dict[int, _Contest] = {}
        for i, contest in enumerate(contests):
            if isinstance(contest, int):
                tokens.append(contest)
            elif len(contest.ids) > _FEW:  # at once, as it keeps a whole row
                tokens.append(self._winner(contest, contest.ids, contest.scaled))
            else:
                few[i] = contest
                tokens.append(0)
        if few:
            for i, token in zip(few, self._winners(list(few.values())), strict=True):
                tokens[i] = token
        return torch.tensor(tokens, dtype=torch.int64)

    def _contest(self, slot: int, position: int, row: Row, highest: np.float32, ids: TokenIds | None = None) -> _Contest:
        """
        Args:
            row: logits of the vocabulary, or of `ids`.
        """
        params = self._params[slot]
        if params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0:
            kept, scaled = self._survivors(params, row, highest)
            return _Contest(slot, position, kept if ids is None else ids[kept], scaled)
        # Shifted first: a tiny temperature would overflow otherwise.
        scaled = (row - highest) / np.float32(params.temperature)
        if ids is not None:
            return _Contest(slot, position, ids, scaled)
        if self._vocab_size > _FEW and np.count_nonzero(scaled >= _NEAR) <= self._vocab_size // 2:
            ids = np.flatnonzero(scaled >= -_LIKELY)
            if len(ids) <= _FEW:
                return _Contest(slot, position, ids, scaled[ids], scaled)
        return _Contest(slot, position, self._ids, scaled)

    def _survivors(self, params: SamplingParams, row: Row, highest: np.float32) -> tuple[TokenIds, Row]:
        """Which of the row's tokens the filters leave, as indices.

        Looks at the likely tokens, and at all only if these do not decide it.
        """
        temperature = np.float32(params.temperature)
        total = None
        if params.top_p < 1.0 and not 0 < params.top_k < len(row):
            total = float(np.exp((row - highest) / temperature).sum(dtype=np.float64))
        for reach in (np.float32(_LIKELY), np.float32(np.inf)):
            least = highest - reach * temperature
            ids = np.flatnonzero(row >= least)
            scaled = (row[ids] - highest) / temperature
            below = (least - highest) / temperature  # no token left out is above it, even after rounding; -inf if none is
            threshold = self._threshold(params, scaled, len(row), below, total)
            if threshold > below:
                break
        keep = scaled >= threshold
        return ids[keep], scaled[keep]

    @staticmethod
    def _threshold(params: SamplingParams, scaled: Row, size: int, below: np.float32, total: float | None) -> np.float32:
        """Least scaled logit to keep, if it is above `below`; else the tokens given do not decide it.

        Args:
            scaled: the most likely tokens' logits.
            size: of the row that they are from.
            total: sum of exp(scaled) over the row, if top_p wants it and top_k leaves all.
        """
        threshold = np.float32(-np.inf)
        descending = np.sort(scaled)[::-1]
        if 0 < params.top_k < size:
            if params.top_k > len(descending) or descending[params.top_k - 1] <= below > -np.inf:
                return below  # top_p must know all that top_k leaves, equals of the last one too
            threshold = descending[params.top_k - 1]
            descending = descending[: np.count_nonzero(descending >= threshold)]
        if params.top_p < 1.0:
            mass = np.cumsum(np.exp(descending), dtype=np.float64)
            last = int(np.searchsorted(mass, params.top_p * (mass[-1] if total is None else total)))
            if last < len(mass):  # else all of them are kept, and perhaps more
                threshold = descending[last]
        if params.min_p > 0.0:
            threshold = max(threshold, np.float32(np.log(params.min_p)))
        return threshold

    def _winners(self, contests: list[_Contest]) -> list[int]:
        """The tokens drawn in contests of few, with one computation of noise."""
        sizes = [len(contest.ids) for contest in contests]
        keys = np.repeat(np.stack([self._keys[contest.slot] for contest in contests], axis=1), sizes, axis=1)
        positions = np.repeat(np.array([contest.position for contest in contests], dtype=np.uint64), sizes)
        ids = np.concatenate([contest.ids for contest in contests])
        scores = np.concatenate([contest.scaled for contest in contests]) + noise_of_tokens(keys, positions, ids)
        tokens = []
        first = 0
        for contest, size in zip(contests, sizes, strict=True):
            best = first + int(scores[first : first + size].argmax())
            token = int(ids[best])
            if contest.everyone is not None:
                able = np.flatnonzero(contest.everyone >= scores[best] - _MOST_NOISE)
                if len(able) > self._vocab_size // 2:
                    token = self._winner(contest, self._ids, contest.everyone)
                elif len(able) > size:  # both are the most likely tokens, so the larger set contains the smaller
                    token = self._winner(contest, able, contest.everyone[able])
            tokens.append(token)
            first += size
        return tokens

    def _winner(self, contest: _Contest, ids: TokenIds, scaled: Row) -> int:
        """The token drawn in a contest of many."""
        keys = self._keys[contest.slot]
        if BUILT and len(ids) == self._vocab_size:
            ids = self._contenders(contest, scaled)
            scaled = scaled[ids]
        if len(ids) == self._vocab_size:
            noise = noise_of_groups(keys, contest.position, self._groups)[: self._vocab_size]
        else:
            group = ids >> 2
            is_new = np.append(True, group[1:] != group[:-1])
            words = noise_of_groups(keys, contest.position, group[is_new].astype(np.uint64))
            noise = words[4 * (np.cumsum(is_new) - 1) + (ids & 3)]
        return int(ids[(scaled + noise).argmax()])

    def _contenders(self, contest: _Contest, scaled: Row) -> TokenIds:
        """The few tokens that approximate noise, computed in C, puts at the top; all if these are not few."""
        scaled = np.ascontiguousarray(scaled)
        found = np.empty(_FEW, dtype=np.int64)
        seed = self._params[contest.slot].seed & _MASK64
        signed = seed - (1 << 64) if seed >> 63 else seed
        count = kernels.contenders(scaled.ctypes.data, len(scaled), signed, contest.position, found.ctypes.data, len(found))
        return found[:count] if count <= len(found) else self._ids


def float_row(logits: Tensor, row: int) -> Row:
    """One row of logits [R, V] in float32; a view where they are float32 already.

    Not by torch, which would wake a second thread for what takes ten microseconds.
    """
    if logits.dtype is torch.bfloat16:
        bits = logits[row].view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
        bits <<= np.uint32(16)
        return bits.view(np.float32)
    values: Row = logits[row].numpy().astype(np.float32, copy=False)
    return values


def some_rows(logits: Tensor, rows: Sequence[int]) -> Tensor:
    """A copy of some rows of logits [R, V]. Not by torch either."""
    if logits.dtype in (torch.bfloat16, torch.float16):  # numpy knows no bfloat16
        return torch.from_numpy(logits.view(torch.int16).numpy()[list(rows)]).view(logits.dtype)
    return torch.from_numpy(logits.numpy()[list(rows)])


def _some(logits: Tensor, row: int, ids: TokenIds) -> Row:
    """Some entries of one row of logits [R, V], in float32."""
    if logits.dtype is torch.bfloat16:
        return (logits[row].view(torch.int16).numpy().view(np.uint16)[ids].astype(np.uint32) << np.uint32(16)).view(np.float32)
    values: Row = logits[row].numpy()[ids].astype(np.float32, copy=False)
    return values


def possible(row: Row, permitted: npt.NDArray[np.bool_] | None = None) -> tuple[Row, np.float32]:
    """The row and its highest logit, a number. Broken rows are replaced as in the reference.

    NaN is impossible, +inf certain, and if nothing is possible all are equal.

    Args:
        permitted: [V], tokens that may be drawn, if the others are -inf already.
    """
    highest = row.max()  # which is NaN if anything is
    if np.isfinite(highest):
        return row, highest
    row = np.where(np.isnan(row), -_INFINITY, row)
    highest = row.max()
    if np.isfinite(highest):
        return row, highest
    certain = row == highest
    if permitted is not None:
        certain &= permitted
    return np.where(certain, np.float32(0), -_INFINITY), np.float32(0)
